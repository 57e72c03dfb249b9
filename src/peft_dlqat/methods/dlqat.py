"""DL-QAT (arXiv 2504.09223, eq. 3 and 4): a magnitude outside the frozen quantizer, a low-rank update inside.

    w_hat = m * Quantize(W0 + scaling * t * BA; s, b)

Trained: m, A, B. `magnitude="row"` has one m a row, "none" leaves it out: the paper's ablation.

t [out, 1], frozen, is the mean of |s| over a row's groups: B counts in steps of its row's grid, so that one learning
rate moves the codes of all rows, layers and models alike. The paper has no t. It adds nothing to what can be learned,
as B could take it in; but steps of Adam are of one size, and a layer's grid may be several times as fine as another's.
"""

from __future__ import annotations

from ..qweight import Quantizer
from .base import AdapterState, Method


class DLQAT(Method):
    """m * Quantize(W0 + scaling * t * BA; s, b)."""

    name = "dlqat"
    title = "DL-QAT"
    arxiv = "2504.09223"
    magnitudes = ("group", "row", "none")

    def quantizer(self, state: AdapterState) -> Quantizer:
        """Rounded by s and b, decoded by m * s and m * b."""
        A, B = state.low_rank
        return Quantizer(A, state.s.detach().abs().mean(1, keepdim=True) * B, state.s, state.zero, *state.scaled)
