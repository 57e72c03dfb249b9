"""Q8_0, GGML's type of 8 bits for dense tensors: blocks of 32 numbers w = d * q, with a float16 d and int8 q."""

from __future__ import annotations

import torch

Q8_0_BLOCK = 32
_LARGEST = 127


def round_q8_0(value: torch.Tensor) -> torch.Tensor:
    """The numbers that Q8_0 keeps of a tensor [..., a multiple of 32], in its dtype; ggml's own rounding, to the bit.

    What it has rounded it finds again, as d is the largest of a block over 127.
    """
    blocks = value.detach().float().unflatten(-1, (-1, Q8_0_BLOCK))
    d = blocks.abs().amax(-1, keepdim=True) / _LARGEST
    scaled = blocks * torch.where(d == 0, 0.0, 1 / d)
    codes = torch.sign(scaled) * (scaled.abs() + 0.5).floor()  # half away from zero, as C's roundf
    return (d.to(torch.float16).float() * codes).flatten(-2).to(value.dtype)
