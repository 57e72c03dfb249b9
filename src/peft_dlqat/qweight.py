"""From latent weight to codes and back: the arithmetic that training, merge and export share.

    unrounded = (latent - shift) / s                      `unrounded_codes`
    codes     = clip(round(unrounded), qmin, qmax)        `quantize`
    S, Z      = fold(s, zero, m)                          magnitude into scale and zero, rounded as formats keep them
    w_hat     = S * (codes - z)  or  S * (codes - qmin) + M        `dequantize`

(DL-QAT, arXiv 2504.09223, eq. 3 and 4: W_eff = m * Quantize(W0 + BA; s, b).) Multiplying m into the scale *first*
is what makes the trained, the merged and the exported weight equal to the bit: `m * (S * codes)` and `(m * S) * codes`
are not.

Everything is elementwise on tensors grouped as [out, n_groups, group_size]; s, m and the zero are [out, n_groups].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .grid import Grid


def latent_weight(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The real-valued weight before rounding, W0 + scaling * BA, in float32 (float64 if W0 is).

    Args:
        weight: W0 [out, in], any floating dtype.
        A: [r, in].
        B: [out, r].
        scaling: lora_alpha / r.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.to(dtype), B.to(dtype), A.to(dtype), alpha=scaling)


def shipped_zero(zero: torch.Tensor | None, grid: Grid) -> torch.Tensor | None:
    """The zero as the forward uses it: a zero point is real-valued while calibrating, and rounded straight-through."""
    return zero.round() if zero is not None and grid.zero_point == "integer" else zero


def unrounded_codes(latent: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """Grouped latent weight in units of the grid [out, n_groups, group_size]: latent / s + z, or (latent - b) / s."""
    latent = grid.group(latent)
    if grid.zero_point == "float":
        assert zero is not None
        return (latent - zero.unsqueeze(-1)) / scale.unsqueeze(-1)
    units = latent / scale.unsqueeze(-1)
    return units if zero is None else units + zero.unsqueeze(-1)


def round_codes(unrounded: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round half to even, then clip to [qmin, qmax]."""
    return unrounded.round().clamp(grid.qmin, grid.qmax)


def fold(
    scale: torch.Tensor, zero: torch.Tensor | None, magnitude: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply the magnitude into scale and offset, rounded to `grid.scale_dtype`.

    Returns:
        S = rnd(m * s) and, by kind of grid, None, z itself, or M = rnd(m * b + qmin * S). M belongs to the *unsigned*
        code, which is what file formats hold; rounding b on signed codes would not give the same weight.
    """
    folded = grid.round_scale(magnitude * scale)
    if grid.zero_point == "float":
        assert zero is not None
        return folded, grid.round_scale(magnitude * zero + grid.qmin * folded)
    return folded, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """w_hat [out, in] from grouped codes [out, n_groups, group_size] and a folded scale and zero.

    With a 16-bit scale every product is exact in float32, so any engine that dequantizes in float32 finds the same
    bits, with or without fused multiply-add.
    """
    scale = scale.unsqueeze(-1)
    if grid.zero_point == "float":
        assert zero is not None
        weight = scale * (codes - grid.qmin) + zero.unsqueeze(-1)
    elif zero is not None:
        weight = scale * (codes - zero.unsqueeze(-1))
    else:
        weight = scale * codes
    return weight.flatten(-2)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as it ships. `dequantize()`, rounded to the input's dtype, is what training multiplies with.

    Attributes:
        codes: int8 [out, in] in [qmin, qmax].
        scale: S, float32 [out, n_groups], every value exact in `grid.scale_dtype`.
        zero: None, the integer zero point z, or the offset M of the unsigned code; float32 [out, n_groups].
        grid: bits, group size, kind of zero, scale dtype.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    grid: Grid

    def dequantize(self) -> torch.Tensor:
        """w_hat, float32 [out, in]."""
        return dequantize(self.grid.group(self.codes).float(), self.scale, self.zero, self.grid)


def harden(
    latent: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    magnitude: torch.Tensor,
    grid: Grid,
) -> QuantizedWeight:
    """Turn the latent weight [out, in] into codes for good."""
    zero = shipped_zero(zero, grid)
    codes = round_codes(unrounded_codes(latent, scale, zero, grid), grid)
    folded_scale, folded_zero = fold(scale, zero, magnitude, grid)
    return QuantizedWeight(codes.flatten(-2).to(torch.int8), folded_scale, folded_zero, grid)
