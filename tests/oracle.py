"""An independent account of the formula: float64, autograd, straight-through rounding written out."""

from __future__ import annotations

import numpy as np
import torch

from peft_dlqat.quant.grid import Grid

# Of each K-quant, by bits and kind of zero: the range of the integer scales, and the largest integer min.
K_QUANT_RANGES = {
    (2, "float"): (1, 15, 15),
    (3, "none"): (-32, 31, None),
    (4, "float"): (1, 63, 63),
    (5, "float"): (1, 63, 63),
    (6, "none"): (-128, 127, None),
}


def straight_through(rounded: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The value of `rounded`, the gradient of `real`."""
    return real + (rounded - real).detach()


def in_super_blocks(x: torch.Tensor, size: int, low: int, high: int) -> torch.Tensor:
    """Each run of 256 / size numbers of a row as integers times one float16 number, one number after the other."""
    groups, found = 256 // size, x.detach().clone()
    for row in found:
        for start in range(0, len(row), groups):
            values = row[start : start + groups].tolist()
            extreme = max(values, key=abs) if low < 0 else max(*values, 0.0)
            d = float(np.float16(extreme / (low if low < 0 else high)))
            d = np.copysign(max(abs(d), 2.0**-16), d)
            for i, value in enumerate(values):
                integer = min(max(round(value / d), low), high)
                row[start + i] = d * (integer if integer or low == 0 else np.sign(value * d))
    return found


def fake_quantize(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Grid,
    scaling: float,
    in_steps: bool = False,
) -> torch.Tensor:
    """w_hat [out, in] in the dtype of the arguments, differentiable in all of them."""
    size = grid.group_size

    def widen(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(size, dim=1)

    def as_shipped(x: torch.Tensor, offset: bool = False) -> torch.Tensor:
        if grid.k_quant:
            smallest, largest, largest_min = K_QUANT_RANGES[grid.bits, grid.zero_point]
            if offset:
                return straight_through(-in_super_blocks(-x, size, 0, largest_min), x)
            return straight_through(in_super_blocks(x, size, smallest, largest), x)
        return straight_through(x.to(torch.float32).to(grid.scale_dtype).to(x.dtype), x)

    update = scaling * B @ A
    latent = weight if in_steps else weight + update
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    if grid.zero_point == "integer":
        shift, zero = straight_through(shift.round(), shift), straight_through(zero.round(), zero)
    if grid.zero_point == "none":
        real = latent / widen(step)
    elif grid.zero_point == "integer":
        real = latent / widen(step) + widen(shift)
    else:
        real = (latent - widen(shift)) / widen(step)
    if in_steps:
        real = real + update
    clipped = real.clamp(low, high)
    codes = straight_through(clipped.round(), clipped)
    S = as_shipped(scale)
    if grid.zero_point == "none":
        return codes * widen(S)
    if grid.zero_point == "integer":
        return (codes - widen(zero)) * widen(S)
    return (codes - low) * widen(S) + widen(as_shipped(zero + low * S, offset=True))
