"""How the frozen weight is kept while training: in full, or as fixed-point numbers in units of the grid.

W0 in units of its grid is u = W0 / s + z (or (W0 - b) / s), and all that rounding needs to know of it. `int8`, `int4`
and `int2` keep u in 8, 4 or 2 bits (after LR-QAT's phi, arXiv 2406.06385): as many before the point as a code has, and
the rest, `fraction` = stored_bits - bits, for where in the code's cell [code - 1/2, code + 1/2) it lies:

    stored = code * 2**fraction + floor((u - code + 1/2) * 2**fraction)          code = clip(round(u), qmin, qmax)
    u      = (stored + 1/2) / 2**fraction - 1/2                                  the middle of its part of the cell

So W0 itself has the same codes as before, to the bit, and u is off by at most 2**-(fraction + 1), but where it lay
beyond the grid's ends: there it comes to just inside the end's cell. With `fraction` = 0, u is the code.
"""

from __future__ import annotations

import torch

from .grid import Grid

# Bits that a weight takes, by the name that users write; 0: W0 as it is.
STORAGES: dict[str, int] = {"full": 0, "int8": 8, "int4": 4, "int2": 2}


def as_rows(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """W0 with its outputs as rows, where a base layer keeps it transposed; a packed weight always has them so."""
    return weight.t() if fan_in_fan_out and weight.is_floating_point() else weight


def encode(units: torch.Tensor, codes: torch.Tensor, grid: Grid, stored_bits: int) -> torch.Tensor:
    """Pack weights in units of the grid.

    Args:
        units: u [rows, in].
        codes: round(u), clipped to [qmin, qmax] [rows, in].
        grid: the grid.
        stored_bits: 2, 4 or 8; at least `grid.bits`.

    Returns:
        uint8 [rows, in * stored_bits / 8]; the first of two or four weights in a byte's lowest bits.
    """
    parts = 2 ** (stored_bits - grid.bits)
    inside = ((units - codes + 0.5) * parts).floor_().clamp_(0, parts - 1)
    # Counted from the lowest, so that all are positive.
    return _pack(((codes - grid.qmin) * parts + inside).to(torch.uint8), stored_bits)


def decode(packed: torch.Tensor, grid: Grid, stored_bits: int) -> torch.Tensor:
    """u, float32 [rows, in], from what `encode` packed."""
    parts = 2 ** (stored_bits - grid.bits)
    # Exact: few bits before the point and few after it.
    return _unpack(packed, stored_bits).float().mul_(1 / parts).add_(grid.qmin - 0.5 + 0.5 / parts)


def _pack(numbers: torch.Tensor, stored_bits: int) -> torch.Tensor:
    per_byte = 8 // stored_bits
    columns = numbers.unflatten(-1, (-1, per_byte)).unbind(-1)
    packed = columns[0].clone()
    for i, column in enumerate(columns[1:], 1):
        packed |= column << (i * stored_bits)
    return packed


def _unpack(packed: torch.Tensor, stored_bits: int) -> torch.Tensor:
    if stored_bits == 8:
        return packed
    mask = 2**stored_bits - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, stored_bits)], -1).flatten(-2)
