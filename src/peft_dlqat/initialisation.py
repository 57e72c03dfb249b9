"""The first scale and zero of a layer, from its weight alone.

Both methods fit one affine grid to every group of input channels; what they return is already on the grid that ships
(scales in `scale_dtype`, zero points integer), so that a fresh adapter is exactly round-to-nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .grid import Grid
from .qweight import dequantize, fold, round_codes, unrounded_codes

# Shares of a group's full range that "mse" tries; below about a third even 2-bit grids only get worse.
_CLIP_SHARES = tuple(1.0 - 0.02 * step for step in range(35))
# Rows are fitted in pieces of about this many weights, so that the search needs little memory beside the model.
_CHUNK = 2**24


def _affine(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale and zero [rows, n_groups] whose grid spans [low, high] (both [rows, n_groups]).

    Without a zero, the scale is signed: the end of larger magnitude falls on qmin, which reaches one level further
    than qmax.
    """
    if grid.zero_point == "none":
        return snap(torch.where(-low > high, low, high) / grid.qmin, None, grid)
    if grid.zero_point == "integer":
        low, high = low.clamp(max=0), high.clamp(min=0)  # z must be a code, so the range holds 0
    scale, _ = snap((high - low) / (grid.qmax - grid.qmin), torch.zeros_like(low), grid)
    zero = grid.qmin - low / scale if grid.zero_point == "integer" else low - grid.qmin * scale
    return snap(scale, zero, grid)


def snap(scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nearest scale and zero [rows, n_groups] that ship, so that codes are chosen for the very grid they land on.

    A scale takes a value of `scale_dtype`; 0 (a group of zeros, or of one repeated value) becomes 1, which keeps zeros
    exactly zero, and one too small or large for the dtype its smallest normal or largest number. A grid with a zero
    has positive scales only. z becomes a code; b becomes the value for which the offset M = b + qmin * s is in
    `scale_dtype`.
    """
    info = torch.finfo(grid.scale_dtype)
    sign = torch.where(scale < 0, -1.0, 1.0) if grid.zero_point == "none" else 1.0
    scale = grid.round_scale(torch.where(scale == 0, 1.0, sign * scale.abs().clamp(info.smallest_normal, info.max)))
    if grid.zero_point == "float" and zero is not None:
        offset = (zero + grid.qmin * scale).clamp(-info.max, info.max)
        zero = grid.round_scale(offset) - grid.qmin * scale
    elif zero is not None:
        zero = zero.round().clamp(grid.qmin, grid.qmax)
    return scale, zero


def minmax(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The grid that just holds each group's smallest and largest weight; arguments as `initialise`."""
    grouped = grid.group(weight)
    return _affine(grouped.amin(-1), grouped.amax(-1), grid)


def mse(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The clipped range, among shares of the full one, with the least squared rounding error of each group.

    Arguments as `initialise`. At low bits clipping a group's few extreme weights refines the grid for all others.
    """
    grouped = grid.group(weight)
    low, high = grouped.amin(-1), grouped.amax(-1)
    best_scale, best_zero = _affine(low, high, grid)
    best_error = torch.full_like(low, torch.inf)
    ones = torch.ones_like(low)
    for share in _CLIP_SHARES:
        scale, zero = _affine(low * share, high * share, grid)
        codes = round_codes(unrounded_codes(weight, scale, zero, grid), grid)
        w_hat = dequantize(codes, *fold(scale, zero, ones, grid), grid)
        error = grid.group((w_hat - weight).square()).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


INITIALISATIONS: dict[str, Callable[[torch.Tensor, Grid], tuple[torch.Tensor, torch.Tensor | None]]] = {
    "mse": mse,
    "minmax": minmax,
}


@torch.no_grad()
def initialise(weight: torch.Tensor, grid: Grid, method: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit scale and zero to a weight.

    Args:
        weight: W0 [out, in], finite, any floating dtype.
        grid: with a group size that divides in.
        method: a key of `INITIALISATIONS`.

    Returns:
        s [out, n_groups] and, by kind of grid, None, z or b [out, n_groups]; float32.
    """
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [INITIALISATIONS[method](chunk.float(), grid) for chunk in weight.split(rows)]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
