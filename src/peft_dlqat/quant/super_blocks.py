"""GGUF's K-quants: the scales of 256 weights are small integers times one float16 number.

A group's scale (and min) has 4 to 8 bits instead of 16, so groups of 16 or 32 weights cost less than half a bit a
weight:

    Q2_K, Q4_K, Q5_K:  w = d * sc * u - dmin * m        u = code - qmin;  sc, m unsigned
    Q3_K, Q6_K:        w = d * sc * code                sc signed

with d and dmin in float16, one a super-block of 256 weights of a row. In the words of `Grid`, S = d * sc and
M = -dmin * m. S and M have at most 19 significant bits: exact in float32, not in any 16-bit type.

d follows from the scales themselves (`super_scales`), which are rounded so in every forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUPER_BLOCK = 256
# d's smallest magnitude. Down to here float16 has bits enough that the largest scale, divided by the rounded d, is
# still rounded to the largest integer; also the scale of a super-block of zeros.
SMALLEST_SCALE = 2.0**-16
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class KQuant:
    """One of GGUF's K-quants.

    Attributes:
        name: GGUF's name of the type.
        bits: width of a code.
        zero_point: "none" for signed scales without mins, "float" for unsigned scales and mins.
        group_size: weights that share an integer scale.
        scale_bits: width of the integer scale, and of the min.
    """

    name: str
    bits: int
    zero_point: str
    group_size: int
    scale_bits: int

    @property
    def settings(self) -> dict[str, int | str]:
        """The settings of `DLQATConfig` that make its grid."""
        return {
            "bits": self.bits,
            "zero_point": self.zero_point,
            "group_size": self.group_size,
            "scale_dtype": "k_quant",
        }

    @property
    def scale_range(self) -> tuple[int, int]:
        """Smallest and largest integer scale; an unsigned one is never 0, since a code needs a step."""
        if self.zero_point == "none":
            return -(2 ** (self.scale_bits - 1)), 2 ** (self.scale_bits - 1) - 1
        return 1, 2**self.scale_bits - 1

    @property
    def min_range(self) -> tuple[int, int]:
        """Smallest and largest integer min."""
        return 0, 2**self.scale_bits - 1

    def scales(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """d [..., n_super_blocks] and sc [..., n_groups] of scales [..., n_groups]; see `super_scales`."""
        return super_scales(scale, SUPER_BLOCK // self.group_size, *self.scale_range)

    def mins(self, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dmin [..., n_super_blocks] and m [..., n_groups] of offsets M [..., n_groups]; a positive one has m = 0."""
        return super_scales(-offset, SUPER_BLOCK // self.group_size, *self.min_range)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight: the code, and its share of the group's integers and the super-block's float16s."""
        kinds = 1 if self.zero_point == "none" else 2
        return self.bits + kinds * (self.scale_bits / self.group_size + 16 / SUPER_BLOCK)


# By what a `Grid` says of itself: bits and kind of zero.
K_QUANTS = {
    (quant.bits, quant.zero_point): quant
    for quant in (
        KQuant("Q2_K", 2, "float", 16, 4),
        KQuant("Q3_K", 3, "none", 16, 6),
        KQuant("Q4_K", 4, "float", 32, 6),
        KQuant("Q5_K", 5, "float", 32, 6),
        KQuant("Q6_K", 6, "none", 16, 8),
    )
}


def check_k_quant(
    bits: int, zero_point: str, group_size: int, layer: str = "", in_features: int = SUPER_BLOCK
) -> None:
    """Refuse a grid that is no K-quant, and a layer whose rows are no whole super-blocks.

    Args:
        bits: of the grid.
        zero_point: of the grid.
        group_size: of the grid.
        layer: name of the layer, for the message.
        in_features: of the layer.

    Raises:
        ValueError: says what would do.
    """
    found = K_QUANTS.get((bits, zero_point))
    at = f" of {layer}" if layer else ""
    if found is None or found.group_size != group_size:
        choices = "; ".join(
            f"bits={quant.bits}, zero_point={quant.zero_point!r}, group_size={quant.group_size} ({quant.name})"
            for quant in K_QUANTS.values()
        )
        raise ValueError(
            f"bits={bits}, zero_point={zero_point!r}, group_size={group_size}{at} is none of GGUF's K-quants, which "
            f"scale_dtype='k_quant' stands for; use one of {choices}, or scale_dtype='bfloat16' for any grid."
        )
    if in_features % SUPER_BLOCK:
        raise ValueError(
            f"in_features={in_features}{at} is not a multiple of {SUPER_BLOCK}, the super-block of "
            "scale_dtype='k_quant'; leave the layer out by exclude_modules, or use scale_dtype='bfloat16'."
        )


def super_scales(scale: torch.Tensor, groups: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest scales of the form d * sc, with the integer sc from `low` to `high`.

    d gives the super-block's scale of largest magnitude the integer of largest magnitude: `low` where integers are
    signed (that scale then fixes the sign of d), else `high`. That makes the function a projection: of scales that
    are d * sc already, it finds d and sc with those very products. A signed sc is never 0: a scale near 0 takes the
    nearest of d and -d, since a code needs a step. What is below an unsigned range becomes `low`.

    Args:
        scale: real-valued [..., n_groups].
        groups: groups in a super-block; divides n_groups.
        low: smallest integer, negative where the integers are signed.
        high: largest integer.

    Returns:
        d [..., n_groups / groups], never 0 and exact in float16, and the integers sc [..., n_groups]; both float32.
    """
    blocks = scale.float().unflatten(-1, (-1, groups))
    smallest, largest = blocks.amin(-1), blocks.amax(-1)
    extreme = torch.where(-smallest > largest, smallest, largest) if low < 0 else largest.clamp(min=0)
    d = extreme / (low if low < 0 else high)
    d = torch.where(d < 0, -1.0, 1.0) * d.abs().clamp(SMALLEST_SCALE, _LARGEST)
    d = d.to(torch.float16).float()
    integers = (blocks / d.unsqueeze(-1)).round().clamp(low, high)
    if low < 0:
        towards = torch.where((blocks < 0) == (d < 0).unsqueeze(-1), 1.0, -1.0)
        integers = torch.where(integers == 0, towards, integers)
    return d, integers.flatten(-2)


def from_super_scales(d: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """d * sc [..., n_groups], exact in float32."""
    return d.repeat_interleave(integers.shape[-1] // d.shape[-1], -1) * integers
