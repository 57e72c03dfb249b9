"""LR-QAT (arXiv 2406.06385): low-rank weights in units of the grid, a learned scale outside.

    w_hat = s * (clip(round(W0 / s0 + z + scaling * BA)) - z)

Trained: A, B and s, the latter as m = s / s0 and so with m's learning rate (`create_dlqat_optimizer`). s0 and z are
the calibrated grid. Beside DL-QAT only the unit of BA differs: the step of its group, not the mean of its row's; with
one scale a row the two are one. The paper's fixed-point store of W0 / s0 is no part of it.
"""

from __future__ import annotations

from ..quant.quantizer import Quantizer
from .base import AdapterState, Method


class LRQAT(Method):
    """s * (clip(round(W0 / s0 + z + scaling * BA)) - z)."""

    name = "lrqat"
    title = "LR-QAT"
    arxiv = "2406.06385"

    def quantizer(self, state: AdapterState) -> Quantizer:
        """Rounded by s0, decoded by s."""
        assert state.A is not None and state.B is not None
        return Quantizer(state.A, state.B, state.s, state.zero, *state.scaled, update_in_grid_units=True)
