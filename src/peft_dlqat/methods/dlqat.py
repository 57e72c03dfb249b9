"""DL-QAT (arXiv 2504.09223, eq. 3 and 4): a magnitude outside the frozen quantizer, a low-rank update inside.

    w_hat = m * Quantize(W0 + scaling * tBA; s, b) + s * shift

Trained: m, A, B, and with `zero_point="float"` shift. `magnitude="row"` has one m a row, "none" leaves it out: the
paper's ablation, and shift with it.

The paper has no shift: what m is to the scale, shift is to the offset, which formats keep as a number of its own. Nor
has it t, the unit of B (see `AdapterState.low_rank`).
"""

from __future__ import annotations

from ..quant.grid import Grid
from ..quant.quantizer import Quantizer
from .base import AdapterState, Method


class DLQAT(Method):
    """m * Quantize(W0 + scaling * tBA; s, b) + s * shift."""

    name = "dlqat"
    title = "DL-QAT"
    arxiv = "2504.09223"
    magnitudes = ("group", "row", "none")

    def shapes(self, out_features: int, n_groups: int, grid: Grid, r: int) -> dict[str, tuple[int, ...]]:
        """A, B, m and, beside an offset, shift."""
        has_shift = grid.zero_point == "float" and self.magnitude != "none"
        shift = {"shift": (out_features, n_groups)} if has_shift else {}
        return {**super().shapes(out_features, n_groups, grid, r), **shift}

    def quantizer(self, state: AdapterState) -> Quantizer:
        """Rounded by s and b, decoded by m * s and m * b + s * shift."""
        scale, zero = state.scaled
        if state.shift is not None and zero is not None:
            zero = zero + state.s * state.shift
        return Quantizer(*state.low_rank, state.s, state.zero, scale, zero)
