"""PEQA (arXiv 2305.14152): the codes of W0 are kept, only their scale is trained.

    w_hat = m * Quantize(W0; s, b)

Trained: m. Also the end-to-end stage of EfficientQAT (E2E-QP, arXiv 2407.11062).
"""

from __future__ import annotations

from ..quant.grid import Grid
from ..quant.quantizer import Quantizer
from .base import AdapterState, Method


class PEQA(Method):
    """m * Quantize(W0; s, b)."""

    name = "peqa"
    title = "PEQA"
    arxiv = "2305.14152"

    def shapes(self, out_features: int, n_groups: int, grid: Grid, r: int) -> dict[str, tuple[int, ...]]:
        """m alone."""
        return self._magnitude_shape(out_features, n_groups)

    def quantizer(self, state: AdapterState) -> Quantizer:
        """Rounded by s and b, decoded by m * s and m * b."""
        return Quantizer(*state.no_update, state.s, state.zero, *state.scaled)
