"""L4Q (arXiv 2402.04902): scale, zero and low-rank update trained together.

    w_hat = Quantize(W0 + scaling * tBA; s, b)       s = m * s0,  z = z0 + shift  or  b = b0 + s0 * shift

Trained: A, B, m and, where the grid has a zero, shift; so s and b move in units of the calibrated grid s0, z0, b0.
This is also the row "learn s, b" of DL-QAT's ablation. t is the unit of B, see `AdapterState.low_rank`.
"""

from __future__ import annotations

from ..quant.grid import Grid
from ..quant.quantizer import Quantizer
from .base import AdapterState, Method, lsq_gradient


class L4Q(Method):
    """Quantize(W0 + scaling * tBA; s, b) with s and b trained."""

    name = "l4q"
    title = "L4Q"
    arxiv = "2402.04902"
    trains_step = True
    magnitude_share = 1 / 12  # m rounds here, and at the others' rate it would move all codes of its group

    def shapes(self, out_features: int, n_groups: int, grid: Grid, r: int) -> dict[str, tuple[int, ...]]:
        """A, B, s / s0 and the shift of the zero."""
        shift = {} if grid.zero_point == "none" else {"shift": (out_features, n_groups)}
        return {**super().shapes(out_features, n_groups, grid, r), **shift}

    def quantizer(self, state: AdapterState) -> Quantizer:
        """Rounded and decoded by the same s and zero."""
        magnitude, shift = lsq_gradient(state.magnitude, state.grid), lsq_gradient(state.shift, state.grid)
        assert magnitude is not None
        s, zero = magnitude * state.s, state.zero
        if shift is not None and zero is not None:
            s = s.abs()  # a step that training takes through zero would turn the grid over
            integer = state.grid.zero_point == "integer"
            zero = (zero + shift).clamp(state.grid.qmin, state.grid.qmax) if integer else zero + state.s * shift
        return Quantizer(*state.low_rank, s, zero, s, zero)
