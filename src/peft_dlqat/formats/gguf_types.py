"""GGUF's block types: which of them hold a grid exactly, and how codes become their bytes.

A row of a weight is a sequence of blocks of 32 or 256 weights; each begins or ends with a float16 scale d (and in some
types a float16 minimum m), beside the codes. A new type is one entry in `BLOCK_TYPES`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..quant.grid import Grid
from .blocks import BlockType
from .k_quants import K_QUANT_BLOCKS


def block_type(grid: Grid) -> BlockType | None:
    """The smallest type that holds a grid exactly."""
    held = [entry for entry in BLOCK_TYPES if entry.holds(grid)]
    return min(held, key=lambda entry: entry.bits_per_weight, default=None)


def _whole_blocks(grid: Grid, block: int) -> bool:
    """Whether no block lies in two groups; a group of -1 stands for a row, whose length is not known yet.

    Scales of a K-quant's own grid have more digits than float16.
    """
    return not grid.k_quant and (grid.group_size == -1 or grid.group_size % block == 0)


def _levels(grid: Grid) -> int:
    """Largest |code - z| on the negative side, in which every type here has one level more."""
    return 2**grid.bits - 1 if grid.zero_point == "integer" else -grid.qmin


def _signed(block: int, lowest: int) -> Callable[[Grid], bool]:
    """Types of w = d * q with q from `lowest` to -lowest - 1."""
    # With a zero point, code - z runs as far up as down.
    return lambda grid: (
        grid.zero_point != "float"
        and _whole_blocks(grid, block)
        and _levels(grid) <= (-lowest - 1 if grid.zero_point == "integer" else -lowest)
    )


def _unsigned(block: int, levels: int) -> Callable[[Grid], bool]:
    """Types of w = d * u + m with u from 0 to levels - 1."""
    return lambda grid: grid.zero_point == "float" and _whole_blocks(grid, block) and 2**grid.bits <= levels


def signed_codes(codes: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> np.ndarray:
    """The integers that S multiplies, int16 [out, in]: codes, or codes - z."""
    wide = grid.group(codes.to(torch.int16))
    if grid.zero_point == "integer":
        assert zero is not None
        wide = wide - zero.to(torch.int16).unsqueeze(-1)
    return wide.flatten(-2).cpu().numpy()


def unsigned_codes(codes: torch.Tensor, grid: Grid) -> np.ndarray:
    """Codes counted from 0, uint8 [out, in]."""
    return (codes.to(torch.int16) - grid.qmin).to(torch.uint8).cpu().numpy()


def by_block(values: torch.Tensor, grid: Grid, block: int) -> np.ndarray:
    """A scale or offset [out, n_groups] as the float16 of each block, its bytes [n_blocks, 2]."""
    repeated = values.to(torch.float16).repeat_interleave(grid.group_size // block, dim=-1)
    return repeated.cpu().numpy().reshape(-1, 1).view(np.uint8)


def _nibbles(values: np.ndarray) -> np.ndarray:
    """The low four bits of 32 values a block: value i below, value i + 16 above, uint8 [n_blocks, 16]."""
    halves = values.reshape(-1, 2, 16).astype(np.uint8) & 15
    return halves[:, 0] | halves[:, 1] << 4


def _fifth_bits(values: np.ndarray) -> np.ndarray:
    """The fifth bits of 32 values a block, uint8 [n_blocks, 4]."""
    return np.packbits(values.reshape(-1, 32).astype(np.uint8) >> 4 & 1, axis=-1, bitorder="little")


def _rows(codes: torch.Tensor, *fields: np.ndarray) -> np.ndarray:
    return np.concatenate(fields, axis=-1).reshape(codes.shape[0], -1)


def _pack_q4_0(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> np.ndarray:
    return _rows(codes, by_block(scale, grid, 32), _nibbles(signed_codes(codes, zero, grid) + 8))


def _pack_q5_0(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> np.ndarray:
    values = signed_codes(codes, zero, grid) + 16
    return _rows(codes, by_block(scale, grid, 32), _fifth_bits(values), _nibbles(values))


def _pack_q8_0(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> np.ndarray:
    values = signed_codes(codes, zero, grid).astype(np.int8).reshape(-1, 32).view(np.uint8)
    return _rows(codes, by_block(scale, grid, 32), values)


def _pack_q4_1(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> np.ndarray:
    assert zero is not None
    d, m = by_block(scale, grid, 32), by_block(zero, grid, 32)
    return _rows(codes, d, m, _nibbles(unsigned_codes(codes, grid)))


def _pack_q5_1(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> np.ndarray:
    assert zero is not None
    values, d, m = unsigned_codes(codes, grid), by_block(scale, grid, 32), by_block(zero, grid, 32)
    return _rows(codes, d, m, _fifth_bits(values), _nibbles(values))


def _pack_tq2_0(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> np.ndarray:
    """w = d * (q - 1) with d = -S and q = 1 - code; 128 weights go into 32 bytes, weight i * 32 + j into byte j."""
    values = (1 - signed_codes(codes, zero, grid)).astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = values[:, :, 0] | values[:, :, 1] << 2 | values[:, :, 2] << 4 | values[:, :, 3] << 6
    return _rows(codes, packed.reshape(-1, 64), by_block(-scale, grid, 256))


BLOCK_TYPES: tuple[BlockType, ...] = (
    BlockType(
        "TQ2_0",
        256,
        2.0625,
        lambda grid: grid.bits == 2 and grid.zero_point == "none" and _whole_blocks(grid, 256),
        _pack_tq2_0,
    ),
    BlockType("Q4_0", 32, 4.5, _signed(32, -8), _pack_q4_0),
    BlockType("Q4_1", 32, 5.0, _unsigned(32, 16), _pack_q4_1),
    BlockType("Q5_0", 32, 5.5, _signed(32, -16), _pack_q5_0),
    BlockType("Q5_1", 32, 6.0, _unsigned(32, 32), _pack_q5_1),
    BlockType("Q8_0", 32, 8.5, _signed(32, -128), _pack_q8_0),
    *K_QUANT_BLOCKS,
)
