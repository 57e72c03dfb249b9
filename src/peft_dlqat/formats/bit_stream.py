"""Codes in 32-bit words, as safetensors files have them: a dense little-endian stream of bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..quant.bit_stream import pack_bits, unpack_bits


def to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: integers from 0 to 2**bits - 1, [..., n].
        bits: width of a code.

    Returns:
        int32 [..., n * bits / 32, rounded up]; what is over in the last word is 0.
    """
    packed = pack_bits(codes.to(torch.uint8), bits)
    return F.pad(packed, (0, -packed.shape[-1] % 4)).contiguous().view(torch.int32)


def from_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes, uint8 [..., count], of words of 32 bits."""
    return unpack_bits(words.contiguous().view(torch.uint8), bits, count)
