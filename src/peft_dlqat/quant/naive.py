"""The formula, as plainly as it can be written. It is the oracle: every faster path is tested against it.

    w_hat = S * (clip(round((W0 + (alpha / r) * t * B @ A) / s + z), qmin, qmax) - z),      S = m * s

This is DL-QAT (arXiv 2504.09223, eq. 3 and 4) with an integer zero point z; without one, z is 0. With an offset b in
its place (`zero_point="float"`) the same line reads

    w_hat = S * clip(round((W0 + (alpha / r) * t * B @ A - b) / s), qmin, qmax) + m * b + s * shift

A row of W0 [out, in] is cut into groups of `group_size` inputs; s, z, b, m and shift hold one number a group, and
t [out, 1] is the mean of |s| over a row. `round` rounds half to even; gradients pass it unchanged (straight-through),
and stop where `clip` does.
"""

from __future__ import annotations

import torch


def straight_through(rounded: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The value of `rounded` with the gradient of `real`."""
    return real + (rounded - real).detach()


def quantize(
    W0: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    m: torch.Tensor,
    s: torch.Tensor,
    z: torch.Tensor | None,
    b: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    bits: int = 4,
    scaling: float = 1.0,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """w_hat [out, in] from W0 [out, in], A [r, in], B [out, r], and m, s, z or b, shift [out, n_groups]."""

    def ships(x: torch.Tensor) -> torch.Tensor:  # scales and offsets train as they are stored
        return straight_through(x.to(scale_dtype).to(x.dtype), x)

    groups, qmin, qmax = s.shape[1], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    latent = (W0 + scaling * s.abs().mean(1, keepdim=True) * B @ A).unflatten(1, (groups, -1))
    S, s_, z_ = ships(m * s).unsqueeze(2), s.unsqueeze(2), 0 if z is None else z.unsqueeze(2)
    real = latent / s_ + z_ if b is None else (latent - b.unsqueeze(2)) / s_
    clipped = real.clamp(qmin, qmax)
    codes = straight_through(clipped.round(), clipped)
    if b is None:
        return (S * (codes - z_)).flatten(1)
    offset = m * b + (0 if shift is None else s * shift)  # of code 0; files store the one of the lowest code
    return (S * (codes - qmin) + ships(offset.unsqueeze(2) + qmin * S)).flatten(1)
