"""Codes packed without a gap: a dense little-endian stream of bits in 32-bit words, as MLX and GPTQ have it."""

from __future__ import annotations

import torch


def bit_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes along the last dimension: 32 of them into `bits` words.

    Args:
        codes: integers from 0 to 2**bits - 1, [..., n] with n a multiple of 32.
        bits: width of a code.

    Returns:
        int32 [..., n * bits / 32].
    """
    chunks = codes.long().unflatten(-1, (-1, 32))
    words = torch.zeros(*chunks.shape[:-1], bits, dtype=torch.int64)
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        words[..., word] |= chunks[..., index] << shift
        if shift + bits > 32:  # the rest goes into the next word
            words[..., word + 1] |= chunks[..., index] >> (32 - shift)
    # The low 32 bits of each, as a signed number.
    low = words & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).flatten(-2)
