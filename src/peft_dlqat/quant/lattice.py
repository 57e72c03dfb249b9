"""Weights that lie on a grid already: quantization-aware training leaves them so, rounded to bfloat16.

All weights of a group then are a scale times an integer, plus an offset where there is one. A search for the least
error misses many of these scales, whose neighbours are as bad as any other. Here each scale is tried that puts the
group's range on a whole number of steps.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from .grid import ZERO_POINTS, Grid

# What bfloat16 rounds a weight by, and what the scale is off by that was found from weights so rounded: 2**-8 each.
_ROUNDING = 2.0**-7
# What an offset found from such weights is off by, in scales.
_OFFSET = 2.0**-4
_SAMPLE, _FIRST = 16, 2  # groups from which a weight is judged, and those whose word is mostly enough
_PART = 256  # weights of such a group that are looked at, about
_GOLDEN = 0.6180339887
_MOST = 0.75  # of the groups must lie on a lattice
# In groups of fewer weights, or of fewer than an eighth of the codes, a lattice may be chance.
_SMALLEST_GROUP = 16
# What is looked for in weights that are not on the grid asked for.
_BITS, _GROUPS = 4, (256, 128, 64, 32)

Zero = torch.Tensor | None


def lies_on(weight: torch.Tensor, grid: Grid) -> bool:
    """Whether a weight [out, in] lies on some scales and zeros of a grid, judged by a few groups.

    A group of one repeated value, such as zeros, says nothing.
    """
    if grid.group_size < max(_SMALLEST_GROUP, 2**grid.bits // 8):
        return False
    groups = grid.group(weight).flatten(0, 1)
    spread = torch.arange(_SAMPLE, device=weight.device) * _GOLDEN % 1  # over rows and columns alike
    groups = groups[(spread * len(groups)).long(), :: max(1, grid.group_size // _PART)].float()
    distinct = 1 + (groups.sort(-1).values.diff(dim=-1) != 0).sum(-1)
    groups, few = groups[distinct > 1], (distinct <= 2**grid.bits)[distinct > 1]
    if not len(groups) or few.sum() < _MOST * len(groups):  # tells most weights, at no cost
        return False
    steps = torch.arange(1, _most_steps(grid) + 1, device=weight.device)
    for sample, least in ((groups[:_FIRST], 1), (groups, _MOST * len(groups))):
        *_, fits = _on_steps(sample.unsqueeze(1), steps, grid)
        if fits.any(-1).sum() < least:
            return False
    return True


def lattice_of(weight: torch.Tensor) -> Grid | None:
    """The grid of at most 4 bits, in the largest groups, that a weight [out, in] lies on; None where there is none."""
    for size in (weight.shape[1], *_GROUPS):
        if weight.shape[1] % size == 0:
            grid = Grid(_BITS, size, "float", torch.float32)
            if lies_on(weight, grid):
                kinds = [replace(grid, bits=bits, zero_point=kind) for bits, kind in product((2, 3, 4), ZERO_POINTS)]
                return next(kind for kind in kinds if kind == grid or lies_on(weight, kind))
    return None


def recover(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Zero, torch.Tensor]:
    """The largest scales, and zeros, that a weight [rows, in] lies on, and for which groups there are such.

    Returns:
        s; None, z or b; and bools, each [rows, n_groups]; not rounded, and of no use in groups that lie on none.
    """
    grouped = grid.group(weight)
    groups = grouped.flatten(0, 1)
    steps, left = torch.ones_like(groups[:, 0]), torch.arange(len(groups), device=weight.device)
    for tried in range(_most_steps(grid), 0, -1):  # mostly the whole range is used
        *_, fits = _on_steps(groups[left], steps.new_tensor(tried), grid)
        steps[left[fits]] = tried
        left = left[~fits]
        if not len(left):
            break
    scale, zero, _ = _on_steps(groups, steps, grid)
    start = zero + grid.qmin * scale if grid.zero_point == "float" else torch.zeros_like(scale)
    integers = ((groups - start.unsqueeze(-1)) / scale.unsqueeze(-1)).round().nan_to_num()
    scale, zero, fits = _on_steps(groups, steps / _common_divisor(integers.long()).clamp(min=1), grid)
    scale, zero, fits = (values.view(grouped.shape[:2]) for values in (scale, zero, fits))
    return scale, None if grid.zero_point == "none" else zero, fits


def _common_divisor(integers: torch.Tensor) -> torch.Tensor:
    """The greatest one of a group's integers [..., group_size]; 0 of zeros."""
    while (length := integers.shape[-1]) > 1:
        integers = torch.gcd(integers[..., : (length + 1) // 2], integers[..., length // 2 :])
    return integers.squeeze(-1)


def _most_steps(grid: Grid) -> int:
    """Of how many scales a group's range is at most: from zero to qmin, or from qmin to qmax."""
    return -grid.qmin if grid.zero_point == "none" else grid.qmax - grid.qmin


def _on_steps(
    groups: torch.Tensor, steps: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and zero by which a group's range is so many steps, mended by two regressions; and whether they fit.

    Args:
        groups: weights [..., group_size].
        steps: how many, of a shape that broadcasts to [...].
        grid: their grid.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    base = torch.zeros_like(low)
    if grid.zero_point == "none":
        scale = torch.where(-low > high, low, high) / -steps  # the longest end gets a negative code
    else:
        scale = (high - low) / steps
        base = low if grid.zero_point == "float" else base
    base = base.expand_as(scale)
    mean = groups.mean(-1) if grid.zero_point == "float" else None
    for _ in range(2):
        integers = ((groups - base.unsqueeze(-1)) / scale.unsqueeze(-1)).round()
        if mean is None:
            scale = (integers * groups).sum(-1) / integers.square().sum(-1)
        else:
            centre = integers.mean(-1)
            around = integers - centre.unsqueeze(-1)
            scale = (around * groups).sum(-1) / around.square().sum(-1)
            base = mean - scale * centre
    integers = ((groups - base.unsqueeze(-1)) / scale.unsqueeze(-1)).round()
    first = integers.amin(-1)
    if grid.zero_point == "none":
        zero = torch.zeros_like(scale)
    elif grid.zero_point == "integer":
        zero = (grid.qmin - first).clamp(grid.qmin, grid.qmax)
    else:
        zero = base + (first - grid.qmin) * scale  # its smallest code is qmin
    codes = integers + (zero if mean is None else grid.qmin - first).unsqueeze(-1)
    inside = (codes.amin(-1) >= grid.qmin) & (codes.amax(-1) <= grid.qmax)
    off = (integers * scale.unsqueeze(-1) + base.unsqueeze(-1) - groups).abs()
    slack = 0 if mean is None else _OFFSET * scale.unsqueeze(-1)
    return scale, zero, inside & (off <= _ROUNDING * groups.abs() + slack).all(-1)
