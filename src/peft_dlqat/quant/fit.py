"""The first scale and zero of a layer, from its weight and, where known, how large each of its inputs is.

Both ways fit one scale and, where there is one, a zero to every group of input channels, and return them as they ship
(scales in `scale_dtype`, zero points integer), so that a fresh adapter is exactly round-to-nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .grid import Grid
from .quantizer import round_to_nearest

# Shares of a group's smallest and largest weight at which "mse" tries to clip, each end on its own. Below a third even
# 2-bit grids only get worse; between the shares, the refinement finds its way.
_CLIP_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_REFINEMENTS = 10
_OF_ZEROS = 2.0**-14  # float16's smallest normal number, which every scale_dtype has
# Rows are fitted in pieces of about this many weights: little memory beside the model, and fast in a CPU's cache.
_CHUNK = 2**17
_CHUNK_ON_GPU = 2**24  # a GPU wants few large launches

Zero = torch.Tensor | None


def _affine(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Zero]:
    """The scale and zero [rows, n_groups] whose codes span [low, high] (both [rows, n_groups]).

    Without a zero, the scale is signed: the end of larger magnitude falls on qmin, which reaches one level further
    than qmax.
    """
    if grid.zero_point == "none":
        return snap(torch.where(-low > high, low, high) / grid.qmin, None, grid)
    if grid.zero_point == "integer":
        low, high = low.clamp(max=0), high.clamp(min=0)  # z must be a code, so the range holds 0
    elif grid.k_quant:
        low = low.clamp(max=0)  # the offset of a K-quant is never positive
    scale, _ = snap((high - low) / (grid.qmax - grid.qmin), torch.zeros_like(low), grid)
    zero = grid.qmin - low / scale if grid.zero_point == "integer" else low - grid.qmin * scale
    return snap(scale, zero, grid)


def snap(scale: torch.Tensor, zero: Zero, grid: Grid) -> tuple[torch.Tensor, Zero]:
    """The nearest scale and zero [rows, n_groups] that ship, so that codes are chosen for the values that ship.

    A scale takes a value of `scale_dtype`; 0 (a group of zeros, or of one repeated value) becomes a small one, so that
    zeros start as zeros, and all that training can do to them is small; and one too small or large for the dtype its
    smallest normal or largest number. A grid with a zero has positive scales only. z becomes a code; b becomes the
    value for which the offset M = b + qmin * s ships. A K-quant's scales depend on their neighbours', so there a 0
    becomes the smallest scale, which spoils none of them.
    """
    info = torch.finfo(grid.scale_dtype)
    sign = torch.where(scale < 0, -1.0, 1.0) if grid.zero_point == "none" else 1.0
    of_zeros = grid.smallest_scale if grid.k_quant else _OF_ZEROS
    magnitude = scale.abs().clamp(grid.smallest_scale, info.max)
    scale = grid.round_scale(torch.where(scale == 0, of_zeros, sign * magnitude))
    if grid.zero_point == "float" and zero is not None:
        offset = (zero + grid.qmin * scale).clamp(-info.max, info.max)
        zero = grid.round_offset(offset) - grid.qmin * scale
    elif zero is not None:
        zero = zero.round().clamp(grid.qmin, grid.qmax)
    return scale, zero


def minmax(weight: torch.Tensor, grid: Grid, importance: torch.Tensor) -> tuple[torch.Tensor, Zero]:
    """The scale and zero whose codes just span each group's smallest and largest weight; arguments as `initialise`."""
    grouped = grid.group(weight)
    return _affine(grouped.amin(-1), grouped.amax(-1), grid)


def mse(weight: torch.Tensor, grid: Grid, importance: torch.Tensor) -> tuple[torch.Tensor, Zero]:
    """The scale and zero of least squared rounding error, each weight's by its importance; arguments as `initialise`.

    First a search over clipped ranges, jointly over where to clip at each end; then the best of them is refined: with
    the codes held, the best scale and zero are a weighted linear regression, whose solution rounds to better codes.
    """
    if grid.k_quant:
        return _mse_of_super_blocks(weight, grid, importance)
    grouped = grid.group(weight)
    low, high = grouped.amin(-1), grouped.amax(-1)
    importance = grid.group(importance.expand_as(weight))
    best_scale, best_zero = _affine(low, high, grid)
    best_error = torch.full_like(low, torch.inf)
    best_codes = torch.zeros_like(grouped)

    def consider(scale: torch.Tensor, zero: Zero) -> None:
        nonlocal best_scale, best_zero, best_error, best_codes
        codes, w_hat = round_to_nearest(weight, scale, zero, grid)
        error = (importance * (grid.group(w_hat) - grouped).square()).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)

    # Without a zero only the longer end counts; clipping the other changes nothing.
    low_shares = _CLIP_SHARES if grid.zero_point != "none" else (None,)
    for high_share in _CLIP_SHARES:
        for low_share in low_shares:
            consider(*_affine(low * (low_share or high_share), high * high_share, grid))
    for _ in range(_REFINEMENTS):
        consider(*snap(*_regression(grouped, best_codes, importance, best_scale, best_zero, grid), grid))
    return best_scale, best_zero


def _mse_of_super_blocks(weight: torch.Tensor, grid: Grid, importance: torch.Tensor) -> tuple[torch.Tensor, Zero]:
    """`mse` for a K-quant: each group's best on its own, not rounded, then the scales of a super-block together.

    Rounded in each try, a group would be judged by what its neighbours try. Groups to which their best before rounding
    is of no use, those of one repeated value or, with an offset, without a negative one, get the range that they span.
    """
    scale, zero = mse(weight, replace(grid, k_quant=False), importance)
    low, high = grid.group(weight).amin(-1), grid.group(weight).amax(-1)
    spanning_scale, spanning_zero = _affine(low, high, grid)
    spanning = low == high
    if zero is not None and spanning_zero is not None:
        spanning |= low > 0
        zero = torch.where(spanning, spanning_zero, zero)
    return snap(torch.where(spanning, spanning_scale, scale), zero, grid)


def _regression(
    weight: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, zero: Zero, grid: Grid
) -> tuple[torch.Tensor, Zero]:
    """Least squares of weight on codes [rows, n_groups, group_size]: s, and b too; z stays.

    Where all codes are one, the scale is left as it was.
    """
    if grid.zero_point == "float":
        total = importance.sum(-1, keepdim=True)
        mean_code = (importance * codes).sum(-1, keepdim=True) / total
        mean_weight = (importance * weight).sum(-1, keepdim=True) / total
        codes, weight = codes - mean_code, weight - mean_weight
    elif zero is not None:
        codes = codes - zero.unsqueeze(-1)
    square = (importance * codes.square()).sum(-1)
    fitted = (importance * codes * weight).sum(-1) / square
    # Of the sign it had: codes rise with the weight, up to rounding.
    scale = torch.where((square > 0) & (fitted * scale > 0), fitted, scale)
    if grid.zero_point == "float":
        zero = mean_weight.squeeze(-1) - scale * mean_code.squeeze(-1)
    return scale, zero


INITIALISATIONS: dict[str, Callable[[torch.Tensor, Grid, torch.Tensor], tuple[torch.Tensor, Zero]]] = {
    "mse": mse,
    "minmax": minmax,
}

# Those to which it matters how large the inputs are.
WEIGHTED = {"mse"}


@torch.no_grad()
def initialise(
    weight: torch.Tensor, grid: Grid, init: str, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, Zero]:
    """Fit scale and zero to a weight.

    Args:
        weight: W0 [out, in], finite, any floating dtype.
        grid: with a group size that divides in.
        init: a key of `INITIALISATIONS`.
        importance: how much an error of each input channel's weights counts [in], not negative: the second moment of
            the layer's inputs makes it the squared error of the layer's output, channels taken as uncorrelated. All
            count the same by default.

    Returns:
        s [out, n_groups] and, by kind of grid, None, z or b [out, n_groups]; float32.
    """
    importance = weight.new_ones(weight.shape[1]) if importance is None else importance.to(weight.device)
    # A channel that was never active would leave its weights to chance; a millionth of the mean does no harm.
    importance = importance.float() / importance.float().mean().clamp(min=1e-30) + 1e-6
    rows = max(1, (_CHUNK if weight.device.type == "cpu" else _CHUNK_ON_GPU) // weight.shape[1])
    parts = [INITIALISATIONS[init](chunk.float(), grid, importance) for chunk in weight.split(rows)]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
