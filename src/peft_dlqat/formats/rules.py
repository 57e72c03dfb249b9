"""What each export format holds: which grids, in how many bits a weight, with scales in which dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import torch

from ..quant.grid import SCALE_DTYPES, Grid
from .gguf_types import block_type

_PACKED_BITS = (2, 3, 4, 8)
MLX_GROUPS = (128, 64, 32)
# Scales that a 16-bit format keeps as float16. A bfloat16 has fewer digits, and so is exact from 2**-17 up; the export
# checks every scale.
_IN_FLOAT16 = (torch.float16, torch.bfloat16)


class Rule(ABC):
    """What one format holds. A group_size of -1 stands for one scale a row.

    Attributes:
        name: the format's name.
        extra: the package's extra that installs what writing it needs; "" where nothing is needed.
        multiple: what the out and in features of a layer must be multiples of.
    """

    name: str
    extra: str = ""
    multiple: int = 1

    @abstractmethod
    def holds(self, grid: Grid) -> bool:
        """Whether every weight of the grid can be stored exactly."""

    @abstractmethod
    def storage(self, grid: Grid) -> tuple[str, float]:
        """The type that a weight of a grid that is held is stored in, and its bits a weight."""

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """The dtype in which the file keeps scales and offsets."""
        return grid.scale_dtype

    def _per_group(self, grid: Grid, zero_bits: int) -> float:
        """A weight's share of its group's scale and zero; one a row counts as nothing."""
        scale_bits = torch.finfo(self.scale_dtype(grid)).bits
        return 0.0 if grid.group_size == -1 else (scale_bits + zero_bits) / grid.group_size

    def problem(self, grid: Grid, shape: tuple[int, int] | None = None) -> str:
        """Why the grid cannot be held and what to change, or ""; shape is a layer's [out, in], where one is meant."""
        if shape is not None and any(features % self.multiple for features in shape):
            return (
                f"{self.name} cannot pack a weight of {shape[0]} x {shape[1]}, since both must be multiples of "
                f"{self.multiple}; leave the layer out of target_modules, or choose another format"
            )
        if self.holds(grid):
            return ""
        remedies = [
            " and ".join(f"{name}={value!r}" for name, value in change.items())
            for change in _remedies(grid, self, None if shape is None else shape[1])
        ]
        remedy = f"use {' or '.join(remedies)}" if remedies else "choose another format, or leave the layer out"
        return f"{self.name} cannot hold {describe(grid)} exactly; {remedy}"


def describe(grid: Grid) -> str:
    """The grid as the settings that make it."""
    return (
        f"bits={grid.bits}, group_size={grid.group_size}, zero_point={grid.zero_point!r}, "
        f"scale_dtype={grid.scale_name!r}"
    )


def _remedies(grid: Grid, rule: Rule, in_features: int | None) -> Iterator[dict[str, Any]]:
    """The smallest changes of settings that make a grid one that is held: of one setting, else of two and so on."""
    near = sorted(range(2, 9), key=lambda bits: (abs(bits - grid.bits), bits))
    choices: dict[str, tuple[Any, ...]] = {
        "zero_point": ("integer", "none", "float"),
        "scale_dtype": tuple(name for name in SCALE_DTYPES if name != "k_quant"),
        "group_size": tuple(size for size in (32, 64, 128) if in_features is None or in_features % size == 0),
        "bits": tuple(near),
    }

    def held(change: Mapping[str, Any]) -> bool:
        values: dict[str, Any] = dict(change)
        if "scale_dtype" in values:
            values |= {"scale_dtype": SCALE_DTYPES[values["scale_dtype"]], "k_quant": False}
        elif grid.k_quant:  # of whose settings none can be changed alone
            return False
        return rule.holds(replace(grid, **values))

    for count in range(1, len(choices) + 1):
        found = False
        for names in combinations(choices, count):
            values = product(*(choices[name] for name in names))
            changes = (dict(zip(names, chosen, strict=True)) for chosen in values)
            if change := next(filter(held, changes), None):
                found = True
                yield change
        if found:
            return


class CompressedTensors(Rule):
    """`pack-quantized`: codes in int32 words, scales [out, n_groups], packed integer zero points."""

    name = "compressed-tensors"
    extra = "compressed-tensors"

    def holds(self, grid: Grid) -> bool:
        """2, 3, 4 and 8 bits, symmetric or with an integer zero."""
        return grid.bits in _PACKED_BITS and grid.zero_point != "float"

    def storage(self, grid: Grid) -> tuple[str, float]:
        """Codes, scales and zero points, nothing padded."""
        zero_bits = grid.bits if grid.zero_point == "integer" else 0
        return f"pack-quantized int{grid.bits}", grid.bits + self._per_group(grid, zero_bits)

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """Beside zero points float32: transformers' loader multiplies in the dtype of the scale, and then rounds."""
        return torch.float32 if grid.zero_point == "integer" else grid.scale_dtype


class GGUF(Rule):
    """Blocks of 32 or 256 weights (`gguf_types`)."""

    name = "gguf"
    extra = "gguf"

    def holds(self, grid: Grid) -> bool:
        """What a block type holds, with scales that fit float16 or are a K-quant's own."""
        return (grid.k_quant or grid.scale_dtype in _IN_FLOAT16) and block_type(grid) is not None

    def storage(self, grid: Grid) -> tuple[str, float]:
        """The smallest block type."""
        chosen = block_type(grid)
        assert chosen is not None
        return chosen.name, chosen.bits_per_weight

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """float16; a K-quant's scale is an integer times one."""
        return torch.float32 if grid.k_quant else torch.float16


def mlx_group(grid: Grid) -> int | None:
    """The largest group of MLX that divides the grid's, whose scales are repeated; 32 for a row of unknown length."""
    return next((size for size in MLX_GROUPS if grid.group_size % size == 0), 32 if grid.group_size == -1 else None)


class MLX(Rule):
    """Affine groups of 32, 64 or 128: w = scale * u + bias with u counted from 0."""

    name = "mlx"
    extra = "mlx"

    def holds(self, grid: Grid) -> bool:
        """2, 3, 4 and 8 bits with any zero; larger groups are cut into 128, 64 or 32."""
        return grid.bits in _PACKED_BITS and mlx_group(grid) is not None

    def storage(self, grid: Grid) -> tuple[str, float]:
        """A scale and a bias a group."""
        group = mlx_group(grid)
        assert group is not None
        return f"affine {grid.bits} bits", grid.bits + 2 * torch.finfo(self.scale_dtype(grid)).bits / group

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """The bias of an integer zero, -S * z, has more digits than S: both are kept in float32."""
        return torch.float32 if grid.zero_point == "integer" else grid.scale_dtype


class GPTQ(Rule):
    """GPTQ v1: codes packed along in, float16 scales [n_groups, out], zero points less one."""

    name = "gptq"
    multiple = 32

    def holds(self, grid: Grid) -> bool:
        """2, 3, 4 and 8 bits, symmetric or with an integer zero, with scales that fit float16."""
        return grid.bits in _PACKED_BITS and grid.zero_point != "float" and grid.scale_dtype in _IN_FLOAT16

    def storage(self, grid: Grid) -> tuple[str, float]:
        """Symmetric grids have zero points too."""
        return f"gptq int{grid.bits}", grid.bits + self._per_group(grid, grid.bits)

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """Always float16."""
        return torch.float16


class Dense(Rule):
    """Merged weights; exact in float32, rounded once in 16 bits."""

    name = "dense"

    def holds(self, grid: Grid) -> bool:
        """Every grid; that a 16-bit dtype rounds the products is the choice of `dtype`."""
        return True

    def storage(self, grid: Grid) -> tuple[str, float]:
        """In the dtype that is exact."""
        return "float32", 32.0


RULES: dict[str, Rule] = {rule.name: rule for rule in (CompressedTensors(), GGUF(), MLX(), GPTQ(), Dense())}
