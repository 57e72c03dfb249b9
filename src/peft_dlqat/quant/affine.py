"""Groups of codes with a scale and perhaps a zero, as safetensors files of quantized models have them.

GPTQ, AWQ, compressed-tensors and MLX keep the same numbers in tensors of different shapes (see `formats`). In memory,
a row is a sequence of groups, each of them

    codes, counted from the lowest, as a dense stream of bits       (bits * group_size / 8 bytes)
    the scale, in the grid's scale_dtype
    the zero: an unsigned byte ("integer"), the unsigned code's offset in scale_dtype ("float"), or nothing ("none")
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .bit_stream import pack_bits, unpack_bits
from .fixed_point import FILE_STORAGES
from .grid import Grid
from .in_file import FileStorage, moved_offset, offset_of
from .quantizer import QuantizedWeight, shipped_zero


@dataclass(frozen=True)
class Affine(FileStorage):
    """Groups of any grid."""

    def problem(self, grid_bits: int, in_features: int) -> str:
        """None: a row is of whole groups."""
        return ""

    def decode(self, packed: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Codes, float32 [rows, in]."""
        codes, _, _ = _parts(packed, grid)
        return unpack_bits(codes, grid.bits, grid.group_size).float().add_(grid.qmin).flatten(-2)

    def scales_and_zeros(self, packed: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the file has them; b of the file's M as near as float32 has it."""
        scale, zero = self.shipped(packed, grid)
        return scale, offset_of(zero, scale, grid) if zero is not None and grid.zero_point == "float" else zero

    def shipped(self, packed: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
        """S, and z or M or None [rows, n_groups], float32."""
        _, scale, zero = _parts(packed, grid)
        numbers = scale.contiguous().view(grid.scale_dtype).squeeze(-1).float()
        if grid.zero_point == "none":
            return numbers, None
        if grid.zero_point == "integer":
            return numbers, zero.squeeze(-1).float() + grid.qmin
        return numbers, zero.contiguous().view(grid.scale_dtype).squeeze(-1).float()

    def ship(
        self, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rounded to the scale's dtype, the largest number at the most."""
        shipped = _rounded(scale, grid)
        if zero is None or grid.zero_point == "integer":
            return shipped, shipped_zero(zero, grid)
        s, M = self.shipped(packed, grid)
        assert M is not None
        return shipped, _rounded(moved_offset(M, s, zero, shipped, grid), grid)

    def write(
        self, packed: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> torch.Tensor:
        """New groups: nothing is copied from W0's."""
        return self.pack(QuantizedWeight(codes, *self.ship(packed, scale, zero, grid), grid))

    def pack(self, weight: QuantizedWeight) -> torch.Tensor:
        """The bytes of a weight, uint8 [rows, row_bytes]."""
        grid, scale, zero = weight.grid, weight.scale.unsqueeze(-1), weight.zero
        parts = [
            pack_bits((grid.group(weight.codes).to(torch.int16) - grid.qmin).to(torch.uint8), grid.bits),
            scale.to(grid.scale_dtype).view(torch.uint8),
        ]
        if zero is not None and grid.zero_point == "integer":
            parts.append((zero.unsqueeze(-1) - grid.qmin).to(torch.uint8))
        elif zero is not None:
            parts.append(zero.unsqueeze(-1).to(grid.scale_dtype).view(torch.uint8))
        return torch.cat(parts, -1).flatten(-2)


def row_bytes(in_features: int, grid: Grid) -> int:
    """Bytes of a row."""
    return in_features // grid.group_size * sum(_sizes(grid))


def _sizes(grid: Grid) -> tuple[int, int, int]:
    """Bytes of a group's codes, scale and zero."""
    scale = grid.scale_dtype.itemsize
    return -(-grid.group_size * grid.bits // 8), scale, {"none": 0, "integer": 1, "float": scale}[grid.zero_point]


def _parts(packed: torch.Tensor, grid: Grid) -> list[torch.Tensor]:
    """The bytes of codes, scales and zeros, each uint8 [rows, n_groups, bytes]."""
    sizes = _sizes(grid)
    return list(packed.unflatten(-1, (-1, sum(sizes))).split(sizes, -1))


def _rounded(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The nearest numbers that are finite; no NaN is made a number."""
    largest = torch.finfo(grid.scale_dtype).max
    return grid.round_scale(values.clamp(-largest, largest))


# One kind for all grids: an adapter's numbers say bits, group size, kind of zero and scale dtype themselves.
AFFINE = Affine(0, 200, name="affine")
FILE_STORAGES[AFFINE.name] = AFFINE
