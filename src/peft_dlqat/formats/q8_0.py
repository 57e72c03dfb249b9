"""Q8_0, GGML's type of 8 bits for dense tensors: blocks of 32 numbers w = d * q, with a float16 d and int8 q."""

from __future__ import annotations

import torch

Q8_0_BLOCK = 32
_LARGEST = 127
_LEAST = 2.0**-24  # of float16


def encode_q8_0(value: torch.Tensor, powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales d, float16 [..., blocks, 1], and codes q, int8 [..., blocks, 32], of a tensor [..., a multiple of 32].

    They are ggml's own, to the bit, but for a block that a power of two holds exactly. What was decoded from either
    is found again.

    Args:
        value: the tensor.
        powers: whether every d is to be a power of two.
    """
    blocks = value.detach().float().unflatten(-1, (-1, Q8_0_BLOCK))
    d = blocks.abs().amax(-1, keepdim=True) / _LARGEST
    mantissa, exponent = torch.frexp(d)
    power = torch.ldexp(torch.ones_like(d), exponent - (mantissa == 0.5).int()).clamp(min=_LEAST)
    exact = (_codes(blocks, power) * power == blocks).all(-1, keepdim=True)
    d = torch.where(exact | torch.tensor(powers, device=d.device), power, d)
    return d.to(torch.float16), _codes(blocks, d).to(torch.int8)


def held_q8_0(value: torch.Tensor, powers: bool = False) -> torch.Tensor:
    """The numbers that a file keeps of a tensor in Q8_0, in the tensor's dtype; arguments as of `encode_q8_0`."""
    d, codes = encode_q8_0(value, powers)
    return (d.float() * codes).flatten(-2).to(value.dtype)


def round_q8_0(value: torch.Tensor) -> torch.Tensor:
    """A tensor rounded to what Q8_0 holds, and its own dtype too; a block that Q8_0 holds stays as it is.

    d * q has 18 digits, which 16 bits have not, so that d is a power of two. In each dtype the same numbers are found.
    """
    exact = (held_q8_0(value.float()) == value.float()).unflatten(-1, (-1, Q8_0_BLOCK)).all(-1)
    return torch.where(exact.repeat_interleave(Q8_0_BLOCK, -1), value, held_q8_0(value, powers=True))


def _codes(blocks: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    scaled = blocks * torch.where(d == 0, 0.0, 1 / d)
    return torch.sign(scaled) * (scaled.abs() + 0.5).floor()  # half away from zero, as C's roundf
