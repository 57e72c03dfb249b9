"""GGUF's block types: which of them hold a grid exactly, and how codes become their bytes.

A row of a weight is a sequence of blocks of 32 or 256 weights; each begins or ends with a float16 scale d (and in some
types a float16 minimum m), beside the codes:

    Q4_0, Q5_0, Q8_0   w = d * q        d, fifth bits [4] of Q5_0, codes
    Q4_1, Q5_1         w = d * u + m    d, m, fifth bits [4] of Q5_1, codes
    TQ2_0              w = d * (t - 1)  codes [64], d
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight


class BlockType(ABC):
    """A way of GGUF to store a weight.

    Attributes:
        name: its name in `gguf.GGMLQuantizationType`.
        block: weights in a block.
        bits_per_weight: stored bits a weight, all told.
    """

    block: int

    @property
    @abstractmethod
    def name(self) -> str:
        """See the class."""

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """See the class."""

    @abstractmethod
    def holds(self, grid: Grid) -> bool:
        """Whether every weight of a grid is one of the type's, where float16 holds the scales (and offsets)."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> np.ndarray:
        """The bytes, uint8 [out, in * bits_per_weight / 8], of a weight on a grid that the type holds."""

    def has_whole_blocks(self, grid: Grid) -> bool:
        """Whether no block lies in two groups; a group of -1 stands for a row, whose length is not known yet."""
        return grid.group_size == -1 or grid.group_size % self.block == 0


@dataclass(frozen=True)
class Signed(BlockType):
    """w = d * q with q of 4, 5 or 8 bits: a code, or code - z."""

    bits: int
    block = 32

    @property
    def name(self) -> str:
        """Q4_0, Q5_0 or Q8_0."""
        return f"Q{self.bits}_0"

    @property
    def bits_per_weight(self) -> float:
        """A code, and a share of d."""
        return self.bits + 16 / self.block

    def holds(self, grid: Grid) -> bool:
        """With a zero point, code - z runs as far up as down; else it has one level more on the negative side."""
        if grid.k_quant or grid.zero_point == "float" or not self.has_whole_blocks(grid):
            return False
        largest = 2 ** (self.bits - 1) - 1
        return 2**grid.bits - 1 <= largest if grid.zero_point == "integer" else -grid.qmin <= largest + 1

    def pack(self, weight: QuantizedWeight) -> np.ndarray:
        """Q8_0 keeps q as it is, the others q counted from 0."""
        codes, d = _signed_codes(weight), _by_block(weight, weight.scale, 32)
        if self.bits == 8:
            return _joined(weight, d, codes.astype(np.int8).reshape(-1, 32))
        return _joined(weight, d, *_code_fields(codes + 2 ** (self.bits - 1), self.bits))


@dataclass(frozen=True)
class Unsigned(BlockType):
    """w = d * u + m with u of 4 or 5 bits: codes counted from 0."""

    bits: int
    block = 32

    @property
    def name(self) -> str:
        """Q4_1 or Q5_1."""
        return f"Q{self.bits}_1"

    @property
    def bits_per_weight(self) -> float:
        """A code, and a share of d and m."""
        return self.bits + 2 * 16 / self.block

    def holds(self, grid: Grid) -> bool:
        """Grids with an offset."""
        offset = grid.zero_point == "float" and not grid.k_quant
        return offset and self.has_whole_blocks(grid) and grid.bits <= self.bits

    def pack(self, weight: QuantizedWeight) -> np.ndarray:
        """M belongs to the unsigned code, as m does."""
        assert weight.zero is not None
        d, m = (_by_block(weight, values, 32) for values in (weight.scale, weight.zero))
        codes = (weight.codes.to(torch.int16) - weight.grid.qmin).cpu().numpy()
        return _joined(weight, d, m, *_code_fields(codes, self.bits))


class Ternary(BlockType):
    """TQ2_0: w = d * (t - 1) with t of two bits."""

    block = 256
    name = "TQ2_0"  # type: ignore[assignment]
    bits_per_weight = 2.0625  # type: ignore[assignment]

    def holds(self, grid: Grid) -> bool:
        """Symmetric grids of 2 bits, whose codes go from -2 to 1."""
        symmetric = grid.bits == 2 and grid.zero_point == "none" and not grid.k_quant
        return symmetric and self.has_whole_blocks(grid)

    def pack(self, weight: QuantizedWeight) -> np.ndarray:
        """d = -S and t = 1 - code; 128 weights go into 32 bytes, weight i * 32 + j into byte j."""
        values = (1 - _signed_codes(weight)).astype(np.uint8).reshape(-1, 2, 4, 32)
        packed = values[:, :, 0] | values[:, :, 1] << 2 | values[:, :, 2] << 4 | values[:, :, 3] << 6
        return _joined(weight, packed.reshape(-1, 64), _by_block(weight, -weight.scale, 256))


def _signed_codes(weight: QuantizedWeight) -> np.ndarray:
    """The integers that S multiplies, int16 [out, in]: codes, or codes - z."""
    codes = weight.grid.group(weight.codes.to(torch.int16))
    if weight.zero is not None:
        codes = codes - weight.zero.to(torch.int16).unsqueeze(-1)
    return codes.flatten(-2).cpu().numpy()


def _by_block(weight: QuantizedWeight, values: torch.Tensor, block: int) -> np.ndarray:
    """A scale or offset [out, n_groups] as the float16 of each block [n_blocks, 1]."""
    repeated = values.to(torch.float16).repeat_interleave(weight.grid.group_size // block, dim=-1)
    return repeated.cpu().numpy().reshape(-1, 1)


def _code_fields(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """Codes from 0 of 32 weights a block: fifth bits [n_blocks, 4], if there are, and the low four [n_blocks, 16].

    Of these, weight i is in the low half of byte i, weight i + 16 in its high half.
    """
    values = codes.astype(np.uint8).reshape(-1, 32)
    low = values[:, :16] & 15 | values[:, 16:] << 4
    return [np.packbits(values >> 4, axis=-1, bitorder="little"), low] if bits == 5 else [low]


def _joined(weight: QuantizedWeight, *fields: np.ndarray) -> np.ndarray:
    """Rows of blocks of their fields."""
    return np.concatenate([field.view(np.uint8) for field in fields], axis=-1).reshape(weight.codes.shape[0], -1)
