"""Numbers of a few bits packed without a gap: a dense little-endian stream of bits in bytes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def pack_bits(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned numbers along the last dimension, the first in the lowest bits of the first byte.

    Args:
        numbers: uint8 [..., n], from 0 to 2**bits - 1.
        bits: width of a number, 1 to 8.

    Returns:
        uint8 [..., n * bits / 8, rounded up]; bits at the end that are of no number are 0.
    """
    count, (period, size) = numbers.shape[-1], _period(bits)
    parts = F.pad(numbers, (0, -count % period)).unflatten(-1, (-1, period)).unbind(-1)
    columns: list[torch.Tensor | None] = [None] * size
    for index, part in enumerate(parts):
        byte, shift = divmod(index * bits, 8)
        low = part << shift if shift else part
        columns[byte] = low if (old := columns[byte]) is None else old | low
        if shift + bits > 8:
            columns[byte + 1] = part >> (8 - shift)
    return torch.stack([column for column in columns if column is not None], -1).flatten(-2)[
        ..., : _bytes(count, bits)
    ]


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The numbers, uint8 [..., count], that `pack_bits` packed."""
    if bits == 8:
        return packed
    (period, size), mask = _period(bits), 2**bits - 1
    columns, parts = F.pad(packed, (0, -packed.shape[-1] % size)).unflatten(-1, (-1, size)).unbind(-1), []
    for index in range(period):
        byte, shift = divmod(index * bits, 8)
        part = columns[byte] >> shift if shift else columns[byte]
        if shift + bits > 8:
            part = part | columns[byte + 1] << (8 - shift)
        parts.append(part & mask)
    return torch.stack(parts, -1).flatten(-2)[..., :count]


def _period(bits: int) -> tuple[int, int]:
    """After how many numbers, and bytes, both begin together again."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
