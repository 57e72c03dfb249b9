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


@dataclass(frozen=True)
class BlockType(ABC):
    """A way of GGUF to store a weight.

    Attributes:
        name: its name in `gguf.GGMLQuantizationType`.
        bits: width of a code.
        bits_per_weight: stored bits a weight, all told.
        block: weights in a block.
    """

    name: str
    bits: int
    bits_per_weight: float
    block: int

    @abstractmethod
    def holds(self, grid: Grid) -> bool:
        """Whether every weight of a grid is one of the type's, where float16 holds the scales (and offsets)."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> np.ndarray:
        """The bytes, uint8 [out, in * bits_per_weight / 8], of a weight on a grid that the type holds."""

    def has_whole_blocks(self, grid: Grid) -> bool:
        """Whether no block lies in two groups; a group of -1 stands for a row, whose length is not known yet."""
        return grid.group_size == -1 or grid.group_size % self.block == 0


class Signed(BlockType):
    """w = d * q: q is a code, or code - z. Q8_0 keeps q as it is, the others q counted from 0."""

    def holds(self, grid: Grid) -> bool:
        """With a zero point, code - z runs as far up as down; else it has one level more on the negative side."""
        if grid.k_quant or grid.zero_point == "float" or not self.has_whole_blocks(grid):
            return False
        return grid.bits < self.bits if grid.zero_point == "integer" else grid.bits <= self.bits

    def pack(self, weight: QuantizedWeight) -> np.ndarray:
        """d, the fifth bits where there are, and the codes."""
        codes, d = _signed_codes(weight), _by_block(weight, weight.scale, self.block)
        if self.bits == 8:
            return _joined(weight, d, codes.astype(np.int8).reshape(-1, self.block))
        return _joined(weight, d, *_code_fields(codes + 2 ** (self.bits - 1), self.bits))


class Unsigned(BlockType):
    """w = d * u + m: u is a code counted from 0, to which M belongs."""

    def holds(self, grid: Grid) -> bool:
        """Grids with an offset."""
        offset = grid.zero_point == "float" and not grid.k_quant
        return offset and self.has_whole_blocks(grid) and grid.bits <= self.bits

    def pack(self, weight: QuantizedWeight) -> np.ndarray:
        """d, m, the fifth bits where there are, and the codes."""
        assert weight.zero is not None
        d, m = (_by_block(weight, values, self.block) for values in (weight.scale, weight.zero))
        codes = (weight.codes.to(torch.int16) - weight.grid.qmin).cpu().numpy()
        return _joined(weight, d, m, *_code_fields(codes, self.bits))


class Ternary(BlockType):
    """w = d * (t - 1) for symmetric codes of 2 bits: d = -S and t = 1 - code, from 0 to 3."""

    def holds(self, grid: Grid) -> bool:
        """Of 2 bits, without a zero."""
        symmetric = grid.bits == self.bits and grid.zero_point == "none" and not grid.k_quant
        return symmetric and self.has_whole_blocks(grid)

    def pack(self, weight: QuantizedWeight) -> np.ndarray:
        """128 weights go into 32 bytes, weight i * 32 + j into byte j."""
        values = (1 - _signed_codes(weight)).astype(np.uint8).reshape(-1, 2, 4, 32)
        packed = values[:, :, 0] | values[:, :, 1] << 2 | values[:, :, 2] << 4 | values[:, :, 3] << 6
        return _joined(weight, packed.reshape(-1, 64), _by_block(weight, -weight.scale, self.block))


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
