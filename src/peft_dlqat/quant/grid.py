"""The grid: which numbers a quantized weight can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .super_blocks import K_QUANTS, SMALLEST_SCALE, KQuant, from_super_scales

ZeroPoint = Literal["none", "integer", "float"]
ZERO_POINTS: tuple[ZeroPoint, ...] = ("none", "integer", "float")

SCALE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "k_quant": torch.float32,  # small integers times one float16 a super-block, see `super_blocks`
}


@dataclass(frozen=True)
class Grid:
    """The representable weights of one layer: signed integers of `bits` bits, mapped to reals group by group.

    Every `group_size` consecutive input channels of an output row share one scale S, and one zero z or offset M:

    | `zero_point` | w_hat                       | state beside the scale               |
    |--------------|-----------------------------|--------------------------------------|
    | "none"       | `S * code`                  | none; S is signed                    |
    | "integer"    | `S * (code - z)`            | z, an integer in [qmin, qmax]; S > 0 |
    | "float"      | `S * (code - qmin) + M`     | b, any real; S > 0                   |

    S (and M) are values of `scale_dtype`, the type in which file formats keep them; with `k_quant`, integers of a few
    bits times one float16 number per 256 weights, as GGUF's K-quants keep them (see `super_blocks`).

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: input channels that share a scale; divides in_features (equal to it: one scale a row).
        zero_point: kind of zero, see the table.
        scale_dtype: torch.bfloat16, torch.float16 or torch.float32.
        k_quant: whether the scales are those of one of `super_blocks.K_QUANTS`, which bits, zero_point and group_size
            then must name; M <= 0, and 256 divides in_features. `scale_dtype` is torch.float32, in which S is exact.
    """

    bits: int
    group_size: int
    zero_point: ZeroPoint
    scale_dtype: torch.dtype
    k_quant: bool = False

    @property
    def qmin(self) -> int:
        """Smallest code, -2**(bits-1)."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code, 2**(bits-1) - 1."""
        return 2 ** (self.bits - 1) - 1

    def group(self, weight: torch.Tensor) -> torch.Tensor:
        """View [out, in] as [out, n_groups, group_size]."""
        return weight.unflatten(-1, (-1, self.group_size))

    @property
    def super_block(self) -> KQuant:
        """The K-quant that a grid with `k_quant` is."""
        return K_QUANTS[self.bits, self.zero_point]

    @property
    def scale_name(self) -> str:
        """The scales' key in `SCALE_DTYPES`."""
        if self.k_quant:
            return "k_quant"
        return next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.scale_dtype)

    @property
    def smallest_scale(self) -> float:
        """The smallest magnitude of a scale that is kept with full precision."""
        return SMALLEST_SCALE if self.k_quant else torch.finfo(self.scale_dtype).smallest_normal

    def round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest scales [..., n_groups] that ship, in the dtype of `scale`."""
        if self.k_quant:
            return from_super_scales(*self.super_block.scales(scale)).to(scale.dtype)
        return scale.to(self.scale_dtype).to(scale.dtype)

    def round_offset(self, offset: torch.Tensor) -> torch.Tensor:
        """The nearest offsets M [..., n_groups] of the unsigned code that ship; those of a K-quant are at most 0."""
        if self.k_quant:
            return -from_super_scales(*self.super_block.mins(offset)).to(offset.dtype)
        return self.round_scale(offset)

    def bits_per_weight(self) -> float:
        """Stored bits a weight: the code and its share of the scale and zero (an integer zero takes `bits` bits)."""
        if self.k_quant:
            return self.super_block.bits_per_weight
        scale_bits = torch.finfo(self.scale_dtype).bits
        zero_bits = {"none": 0, "integer": self.bits, "float": scale_bits}[self.zero_point]
        return self.bits + (scale_bits + zero_bits) / self.group_size


# Group sizes that take the place of one that does not divide a layer's inputs: engines have kernels for them.
_USUAL_GROUPS = (64, 32)


def fitting_group(in_features: int, group_size: int) -> int:
    """The group size of a layer: the one asked for, -1 being the row; where it divides not, 64, 32 or the row."""
    sizes = (group_size, *(size for size in _USUAL_GROUPS if size < group_size))
    return next((size for size in sizes if size > 0 and in_features % size == 0), in_features)
