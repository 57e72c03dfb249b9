"""DL-QAT (arXiv 2504.09223, eq. 3 and 4): a magnitude outside the frozen quantizer, a low-rank update inside.

    w_hat = m * Quantize(W0 + scaling * BA; s, b)

Trained: m, A, B. `magnitude="row"` has one m a row, "none" leaves it out: the paper's ablation.
"""

from __future__ import annotations

from ..qweight import Quantizer
from .base import AdapterState, Method


class DLQAT(Method):
    """m * Quantize(W0 + scaling * BA; s, b)."""

    name = "dlqat"
    title = "DL-QAT"
    arxiv = "2504.09223"
    magnitudes = ("group", "row", "none")

    def quantizer(self, state: AdapterState) -> Quantizer:
        """Rounded by s and b, decoded by m * s and m * b."""
        return Quantizer(*state.low_rank, state.s, state.zero, *state.scaled)
