"""The grid: which numbers a quantized weight can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

ZeroPoint = Literal["none", "integer", "float"]
ZERO_POINTS: tuple[ZeroPoint, ...] = ("none", "integer", "float")

SCALE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
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

    S (and M) are values of `scale_dtype`, the type in which file formats keep them.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: input channels that share a scale; divides in_features (equal to it: one scale a row).
        zero_point: kind of zero, see the table.
        scale_dtype: torch.bfloat16, torch.float16 or torch.float32.
    """

    bits: int
    group_size: int
    zero_point: ZeroPoint
    scale_dtype: torch.dtype

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

    def round_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest values of `scale_dtype`, in the dtype of `scale`."""
        return scale.to(self.scale_dtype).to(scale.dtype)

    def bits_per_weight(self) -> float:
        """Stored bits a weight: the code and its share of the scale and zero (an integer zero takes `bits` bits)."""
        scale_bits = torch.finfo(self.scale_dtype).bits
        zero_bits = {"none": 0, "integer": self.bits, "float": scale_bits}[self.zero_point]
        return self.bits + (scale_bits + zero_bits) / self.group_size


def largest_group(in_features: int, group_size: int) -> int:
    """The largest divisor of `in_features` that is not above `group_size`; -1 stands for the whole row."""
    if group_size == -1:
        return in_features
    return next(size for size in range(min(group_size, in_features), 0, -1) if in_features % size == 0)
