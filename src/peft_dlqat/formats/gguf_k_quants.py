"""GGUF's K-quants, bit for bit: codes and integer scales in the byte layout of ggml's blocks.

    super-block of 256 weights     bytes
    Q2_K   scales and mins [16], codes [64], d, dmin              84
    Q3_K   codes' high bits [32], low bits [64], scales [12], d   110
    Q4_K   d, dmin, scales and mins [12], codes [128]             144
    Q5_K   as Q4_K, with the codes' high bits [32] before         176
    Q6_K   codes' low bits [128], high bits [64], scales [16], d  210

A K-quant holds two kinds of grid exactly: its own (`scale_dtype="k_quant"`), and any with one 16-bit scale for whole
super-blocks, whose integer scales are then all 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from ..quant.super_blocks import K_QUANTS, SUPER_BLOCK, KQuant, from_super_scales
from .gguf_blocks import BlockType

Array = np.ndarray


def _fields(values: Array, shape: tuple[int, int, int], width: int) -> Array:
    """Numbers of `width` bits [blocks, n] in bytes [blocks, n * width / 8].

    Args:
        values: uint8.
        shape: (parts, fields, bytes): a part of the values is written as `bytes` bytes, each of which has in its k-th
            field from the low end the value that stands k * `bytes` further on.
        width: bits of a field.
    """
    grouped = values.reshape(len(values), *shape)
    packed = np.zeros_like(grouped[:, :, 0])
    for field in range(shape[1]):
        packed |= grouped[:, :, field] << np.uint8(width * field)
    return packed.reshape(len(values), -1)


def _join(*parts: Array) -> Array:
    """Blocks [blocks, bytes] of their parts, float16 numbers [blocks, 1] or bytes."""
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)


def pack_q2_k(codes: Array, d: Array, sc: Array, dmin: Array, m: Array) -> Array:
    """Blocks of Q2_K [blocks, 84].

    Args:
        codes: unsigned, uint8 [blocks, 256].
        d: float16 [blocks, 1].
        sc: integer scales, uint8 [blocks, 16].
        dmin: float16 [blocks, 1].
        m: integer mins, uint8 [blocks, 16].
    """
    return _join(sc | m << 4, _fields(codes, (2, 4, 32), 2), d, dmin)


def pack_q3_k(codes: Array, d: Array, sc: Array) -> Array:
    """Blocks of Q3_K [blocks, 110]; arguments as `pack_q2_k`, codes + 4 and signed scales + 32."""
    scales = _join(_fields(sc & 15, (1, 2, 8), 4), _fields(sc >> 4, (1, 4, 4), 2))
    return _join(_fields(codes >> 2, (1, 8, 32), 1), _fields(codes & 3, (2, 4, 32), 2), scales, d)


def _scales_and_mins(sc: Array, m: Array) -> Array:
    """Twelve bytes: of the first four groups whole numbers, in whose two spare bits the others' high bits are."""
    low, high = (np.concatenate([part[:, :4], part[:, 4:] >> 4], axis=1) for part in (sc, m))
    rest = np.concatenate([sc[:, 4:] & 15, m[:, 4:] & 15], axis=1)
    return _join(_fields(low, (1, 2, 4), 6), _fields(high, (1, 2, 4), 6), _fields(rest, (1, 2, 4), 4))


def pack_q4_k(codes: Array, d: Array, sc: Array, dmin: Array, m: Array) -> Array:
    """Blocks of Q4_K [blocks, 144]; arguments as `pack_q2_k`, with 8 scales and mins a block."""
    return _join(d, dmin, _scales_and_mins(sc, m), _fields(codes, (4, 2, 32), 4))


def pack_q5_k(codes: Array, d: Array, sc: Array, dmin: Array, m: Array) -> Array:
    """Blocks of Q5_K [blocks, 176]; arguments as `pack_q4_k`."""
    high = _fields(codes >> 4, (1, 8, 32), 1)
    return _join(d, dmin, _scales_and_mins(sc, m), high, _fields(codes & 15, (4, 2, 32), 4))


def pack_q6_k(codes: Array, d: Array, sc: Array) -> Array:
    """Blocks of Q6_K [blocks, 210]; arguments as `pack_q2_k`, codes + 32 and signed scales + 128."""
    low, high = _fields(codes & 15, (2, 2, 64), 4), _fields(codes >> 4, (2, 4, 32), 2)
    return _join(low, high, sc ^ np.uint8(128), d)


@dataclass(frozen=True)
class KQuantType(BlockType):
    """A K-quant as a type of tensor in a file.

    Attributes:
        quant: its numbers.
        pack_blocks: codes and scales -> the bytes of its blocks.
    """

    quant: KQuant
    pack_blocks: Callable[..., Array]

    def holds(self, grid: Grid) -> bool:
        """Whether every weight on the grid is exact in this type, as long as its scales are exact in float16."""
        if grid.k_quant:
            return grid.super_block == self.quant and grid.group_size == self.quant.group_size
        zeros = ("none",) if self.quant.zero_point == "none" else ("none", "integer", "float")
        return (
            self.has_whole_blocks(grid)
            and grid.scale_dtype != torch.float32
            and grid.bits <= self.bits
            and grid.zero_point in zeros
        )

    def pack(self, weight: QuantizedWeight) -> Array:
        """The tensor's bytes, uint8 [out, in / 256 * bytes of a block], as `gguf.GGUFWriter.add_tensor` takes them.

        Args:
            weight: on a grid that the type holds.

        Raises:
            ValueError: if the type does not hold the grid, or a scale is not exact in float16.
        """
        if not self.holds(weight.grid):
            raise ValueError(f"{self.name} does not hold the grid {weight.grid} exactly; choose another type.")
        first = weight.grid.qmin if self._has_mins else -(2 ** (self.bits - 1))
        codes = weight.codes.to(torch.int16) - first
        arrays = [codes.reshape(-1, SUPER_BLOCK).to(torch.uint8)]
        for d, integers in self._own_scales(weight) if weight.grid.k_quant else self._unit_scales(weight):
            arrays += [self._float16(d).reshape(-1, 1), integers.reshape(len(arrays[0]), -1).to(torch.uint8)]
        return self.pack_blocks(*(array.cpu().numpy() for array in arrays)).reshape(len(codes), -1)

    @property
    def _has_mins(self) -> bool:
        return self.quant.zero_point == "float"

    @property
    def _zero_scale(self) -> int:
        """What is added to a signed integer scale to write it."""
        return 0 if self._has_mins else 2 ** (self.quant.scale_bits - 1)

    def _own_scales(self, weight: QuantizedWeight) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(d, integers as they are written) of the scales and, where the type has them, of the mins."""
        d, sc = self.quant.scales(weight.scale)
        self._check_same(from_super_scales(d, sc), weight.scale)
        pairs = [(d, sc + self._zero_scale)]
        if weight.zero is not None:
            pairs.append(self.quant.mins(weight.zero))
            self._check_same(-from_super_scales(*pairs[1]), weight.zero)
        return pairs

    def _unit_scales(self, weight: QuantizedWeight) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As `_own_scales`, for a grid with one scale for whole super-blocks: every integer scale is 1.

        w = S * (code - z) = S * u - S * (z - qmin), so the min is S itself times an integer; that of an offset M is -M
        times 1.
        """
        grid = weight.grid

        def by_block(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.repeat_interleave(grid.group_size // SUPER_BLOCK, -1)

        def by_group(tensor: torch.Tensor) -> torch.Tensor:
            return by_block(tensor).repeat_interleave(SUPER_BLOCK // self.quant.group_size, -1)

        ones = torch.ones_like(weight.scale)
        scales = by_block(weight.scale), by_group(ones + self._zero_scale)
        if not self._has_mins:
            return [scales]
        if grid.zero_point == "float":
            assert weight.zero is not None
            return [scales, (-by_block(weight.zero), by_group(ones))]
        zero = torch.zeros_like(ones) if weight.zero is None else weight.zero
        return [scales, (scales[0], by_group(zero - grid.qmin))]

    def _float16(self, values: torch.Tensor) -> torch.Tensor:
        rounded = values.to(torch.float16)
        self._check_same(rounded.float(), values)
        return rounded

    def _check_same(self, held: torch.Tensor, values: torch.Tensor) -> None:
        wrong = held != values
        if wrong.any():
            raise ValueError(
                f"the scale or offset {values[wrong][0].item()} is not exact in {self.name}, which keeps float16 "
                "numbers; export as another type, or train with scale_dtype='float16' or 'k_quant'."
            )


_PACKERS: dict[str, Callable[..., Array]] = {
    "Q2_K": pack_q2_k,
    "Q3_K": pack_q3_k,
    "Q4_K": pack_q4_k,
    "Q5_K": pack_q5_k,
    "Q6_K": pack_q6_k,
}
K_QUANT_TYPES = {
    quant.name: KQuantType(quant.name, quant.bits, quant.bits_per_weight, SUPER_BLOCK, quant, _PACKERS[quant.name])
    for quant in K_QUANTS.values()
}
