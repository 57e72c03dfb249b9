"""The first scale and zero of a layer, from its weight and, where known, how large each of its inputs is.

Both ways fit one scale and, where there is one, a zero to every group of input channels, and return them as they ship
(scales in `scale_dtype`, zero points integer), so that a fresh adapter is exactly round-to-nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from .grid import Grid
from .lattice import lies_on, recover

# Shares of a group's smallest and largest weight at which "mse" tries to clip. Below a third even 2-bit grids only get
# worse; between the shares, the regressions find their way.
_CLIP_SHARES = tuple((share, share) for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4))
_UNEVEN_SHARES = ((1.0, 0.7), (0.7, 1.0), (0.8, 0.5), (0.5, 0.8))  # beside these where the grid has a zero
# Ways of the zero from the best so far, which are tried in both directions: of z in codes, of b in scales.
_MOVES = {"none": (), "integer": (1.0, 1.0), "float": (0.5, 0.25, 0.12)}
_REFINEMENTS = 3
# By so much a candidate must be better. Two that end alike differ in last bits, which must not choose between them.
_MARGIN = 1e-4
# Of weights on a lattice an error below this part of their own size is bfloat16's: there the first of several stays.
_NOISE = 2.0**-18
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


def mse(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor, lattice: bool = False
) -> tuple[torch.Tensor, Zero]:
    """The scale and zero of least squared rounding error, each weight's by its importance; arguments as `initialise`.

    Clipped ranges are tried, then zeros beside the best one's. Each is mended in closed form: with its codes held, the
    best scale and offset are a weighted linear regression. The best of all is rounded and mended again, a few times.
    `lattice` tries those of `lattice.recover` first.
    """
    if grid.k_quant:
        return _mse_of_super_blocks(weight, grid, importance, lattice)
    search = _Search(weight, grid, importance, _NOISE if lattice else 0.0)
    low, high = grid.group(weight).amin(-1), grid.group(weight).amax(-1)
    if lattice:
        scale, zero = _affine(low, high, grid)
        own_scale, own_zero, found = recover(weight, grid)
        zero = None if zero is None or own_zero is None else torch.where(found, own_zero, zero)
        search.consider(*snap(torch.where(found, own_scale, scale), zero, grid))
    for low_share, high_share in _CLIP_SHARES + (() if grid.zero_point == "none" else _UNEVEN_SHARES):
        scale, zero = _affine(low * low_share, high * high_share, grid)
        search.consider(scale, zero)
        if grid.zero_point == "none":  # the other sign puts the longer end among the positive codes
            search.consider(-scale, None)
    for size in _MOVES[grid.zero_point]:
        for step in (size, -size):
            assert search.zero is not None
            move = step if grid.zero_point == "integer" else step * search.scale
            search.consider(*snap(search.scale, search.zero + move, grid))
    for _ in range(_REFINEMENTS):
        search.consider(search.scale, search.zero)
    return search.scale, search.zero


class _Search:
    """The best scale and zero [rows, n_groups] so far, for each group of a weight [rows, in].

    A candidate costs one rounding. All else follows from a group's weighted moments of codes q and weights w: sums
    over the group of h * q, h * q**2 and h * q * w, where h is the importance. Errors below `noise` times that of
    zeros are taken as the same.
    """

    def __init__(self, weight: torch.Tensor, grid: Grid, importance: torch.Tensor, noise: float) -> None:
        self._grid, self._w, self._noise = grid, grid.group(weight), noise
        # An offset takes a group's mean; beside a large one the moments would lose their digits.
        self._mean = self._w.mean(-1) if grid.zero_point == "float" else torch.zeros(())
        if grid.zero_point == "float":
            self._w = self._w - self._mean.unsqueeze(-1)
        self._h = grid.group(importance.expand_as(weight))
        self._hw = self._h * self._w
        self._sum_h, self._sum_hw = self._h.sum(-1), self._hw.sum(-1)
        self._sum_hww = (self._hw * self._w).sum(-1)
        self._q, self._product = torch.empty_like(self._w), torch.empty_like(self._w)
        self._error = torch.full_like(self._sum_h, torch.inf)
        self.scale: torch.Tensor = torch.ones_like(self._sum_h)
        self.zero: Zero = None if grid.zero_point == "none" else torch.zeros_like(self._sum_h)

    def consider(self, scale: torch.Tensor, zero: Zero) -> None:
        """Round by a scale and zero, mend them, and keep them where they are better."""
        scale, zero, error = self._mended(scale, zero, *self._moments(scale, zero))
        better = error < (1 - _MARGIN) * self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def _moments(self, scale: torch.Tensor, zero: Zero) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of h * q, h * q**2 and h * q * w for the codes that a scale and zero give; close to those that ship."""
        q, product, inverse = self._q, self._product, (1 / scale).unsqueeze(-1)
        if zero is None:
            torch.mul(self._w, inverse, out=q)
        else:
            start = zero if self._grid.zero_point == "integer" else (self._mean - zero) / scale
            torch.addcmul(start.unsqueeze(-1), self._w, inverse, out=q)
        q.round_().clamp_(self._grid.qmin, self._grid.qmax)
        sum_hqw = torch.mul(self._hw, q, out=product).sum(-1)
        sum_hq = torch.mul(self._h, q, out=product).sum(-1)
        return sum_hq, product.mul_(q).sum(-1), sum_hqw

    def _mended(
        self, scale: torch.Tensor, zero: Zero, sum_hq: torch.Tensor, sum_hqq: torch.Tensor, sum_hqw: torch.Tensor
    ) -> tuple[torch.Tensor, Zero, torch.Tensor]:
        """The best scale, and b too, for the codes of these moments; z stays. And the error that is left.

        Where all codes are one, the scale is left as it was.
        """
        kind, h, hw = self._grid.zero_point, self._sum_h, self._sum_hw
        square, mixed = sum_hqq, sum_hqw
        if kind == "float":
            square, mixed = sum_hqq - sum_hq.square() / h, sum_hqw - sum_hq * hw / h
        elif zero is not None:
            square, mixed = sum_hqq - zero * (2 * sum_hq - zero * h), sum_hqw - zero * hw
        fitted = mixed / square
        # Of the sign it had: codes rise with the weight, up to rounding.
        scale = torch.where((square > 0) & (fitted * scale > 0), fitted, scale)
        if kind == "float":
            zero = (hw - scale * sum_hq) / h + self._mean
        scale, zero = snap(scale, zero, self._grid)
        error = self._sum_hww - scale * (2 * sum_hqw - scale * sum_hqq)
        if zero is not None:  # w_hat = scale * q + offset
            offset = zero - self._mean if kind == "float" else -scale * zero
            error = error - offset * (2 * (hw - scale * sum_hq) - offset * h)
        return scale, zero, torch.maximum(error, self._noise * self._sum_hww) if self._noise else error


def _mse_of_super_blocks(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor, lattice: bool
) -> tuple[torch.Tensor, Zero]:
    """`mse` for a K-quant: each group's best on its own, not rounded, then the scales of a super-block together.

    Rounded in each try, a group would be judged by what its neighbours try. Groups to which their best before rounding
    is of no use, those of one repeated value or, with an offset, without a negative one, get the range that they span.
    """
    scale, zero = mse(weight, replace(grid, k_quant=False), importance, lattice)
    low, high = grid.group(weight).amin(-1), grid.group(weight).amax(-1)
    spanning_scale, spanning_zero = _affine(low, high, grid)
    spanning = low == high
    if zero is not None and spanning_zero is not None:
        spanning |= low > 0
        zero = torch.where(spanning, spanning_zero, zero)
    return snap(torch.where(spanning, spanning_scale, scale), zero, grid)


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
    fit = INITIALISATIONS[init]
    if fit is mse and lies_on(weight, grid):
        fit = partial(mse, lattice=True)
    parts = [fit(chunk.float(), grid, importance) for chunk in weight.split(rows)]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
