"""How the frozen weight is kept while training: in full, or as fixed-point numbers in units of the grid.

W0 in units of its grid is u = W0 / s + z (or (W0 - b) / s), and all that rounding needs to know of it. `int8`, `int4`
and `int2` keep u in 8, 4 or 2 bits (after LR-QAT's phi, arXiv 2406.06385): as many before the point as a code has, and
the rest, `fraction` = bits of the storage - bits of the grid, for where in the code's cell [code - 1/2, code + 1/2) it
lies:

    stored = code * 2**fraction + floor((u - code + 1/2) * 2**fraction)          code = clip(round(u), qmin, qmax)
    u      = (stored + 1/2) / 2**fraction - 1/2                                  the middle of its part of the cell

So W0 itself has the same codes as before, to the bit, and u is off by at most 2**-(fraction + 1). Where it lay beyond
the grid's ends, it comes to just inside the end's cell. With `fraction` = 0, u is the code.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .bit_stream import pack_bits, unpack_bits
from .grid import Grid

if TYPE_CHECKING:
    from .in_file import FileStorage


@dataclass(frozen=True)
class Storage:
    """A way to keep W0. To add one, put it into `STORAGES`; a subclass may encode and decode in its own way.

    Attributes:
        bits: that a weight takes; 0: W0 as it is.
        number: what saved adapters know the storage by, never changed and no other's; the bits by default.

    Raises:
        ValueError: for bits that do not fill whole bytes, unless a subclass packs them in its own way.
    """

    bits: int
    number: int = -1

    def __post_init__(self) -> None:
        """Check the bits."""
        if self.number == -1:
            object.__setattr__(self, "number", self.bits)
        if type(self) is Storage and self.bits and 8 % self.bits:
            raise ValueError(f"bits={self.bits} must be 2, 4 or 8; write a subclass with another packing for others.")

    def problem(self, grid_bits: int, in_features: int) -> str:
        """Why a layer's weight cannot be kept so, and what would do; "" where it can."""
        if self.bits and self.bits < grid_bits:
            fitting = [name for name, storage in STORAGES.items() if not 0 < storage.bits < grid_bits]
            return f"cannot hold codes of {grid_bits} bits; use {' or '.join(map(repr, fitting))}"
        if in_features * self.bits % 8:
            return (
                f"packs whole bytes, but in_features={in_features} is no multiple of {8 // self.bits}; use "
                "storage='int8', or exclude_modules"
            )
        return ""

    def encode(self, units: torch.Tensor, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Pack weights in units of the grid.

        Args:
            units: u [rows, in].
            codes: round(u), clipped to [qmin, qmax] [rows, in].
            grid: the grid, of no more bits than the storage.

        Returns:
            uint8 [rows, in * bits / 8]; the first of two or four weights in a byte's lowest bits.
        """
        parts = 2 ** (self.bits - grid.bits)
        inside = ((units - codes + 0.5) * parts).floor_().clamp_(0, parts - 1)
        # Counted from the lowest, so that all are positive.
        return pack_bits(((codes - grid.qmin) * parts + inside).to(torch.uint8), self.bits)

    def decode(self, packed: torch.Tensor, grid: Grid) -> torch.Tensor:
        """u, float32 [rows, in], from what `encode` packed."""
        parts = 2 ** (self.bits - grid.bits)
        # Exact: few bits before the point and few after it.
        return (
            unpack_bits(packed, self.bits, packed.shape[-1] * 8 // self.bits)
            .float()
            .mul_(1 / parts)
            .add_(grid.qmin - 0.5 + 0.5 / parts)
        )


# By the name that users write.
STORAGES: dict[str, Storage] = {"full": Storage(0), "int8": Storage(8), "int4": Storage(4), "int2": Storage(2)}
# What a user writes for a model that was loaded from quantized files; each layer has one of `FILE_STORAGES` then.
IN_FILE = "file"
FILE_STORAGES: dict[str, FileStorage] = {}  # `in_file` says what they are
ALL_STORAGES = ChainMap[str, Storage](STORAGES, FILE_STORAGES)  # type: ignore[arg-type]


def storage_of(number: int) -> str | None:
    """The name of the storage that saved adapters know as `number`; None if there is none."""
    return next((name for name, storage in ALL_STORAGES.items() if storage.number == number), None)


def as_rows(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """W0 with its outputs as rows, where a base layer keeps it transposed; a packed weight always has them so."""
    return weight.t() if fan_in_fan_out and weight.is_floating_point() else weight
