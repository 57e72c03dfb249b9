"""QA-LoRA (arXiv 2309.14717): a low-rank update that is constant in each group, and so part of its offset.

    w_hat = Quantize(W0; s, b) + scaling * tBA,     A [r, n_groups]: the same for all inputs of a group

Trained: A, B. The codes of W0 are kept. Merging into the offsets is exact, but needs real-valued ones:
`zero_point="float"`. t is the unit of B, see `AdapterState.low_rank`.
"""

from __future__ import annotations

import torch

from ..quant.grid import Grid
from ..quant.quantizer import Quantizer
from .base import AdapterState, Method


class QALoRA(Method):
    """Quantize(W0; s, b) + scaling * tBA with A [r, n_groups]."""

    name = "qalora"
    title = "QA-LoRA"
    arxiv = "2309.14717"
    magnitudes = ("none",)
    zero_points = ("float",)

    def shapes(self, out_features: int, n_groups: int, grid: Grid, r: int) -> dict[str, tuple[int, ...]]:
        """A over groups, and B."""
        return {"A": (r, n_groups), "B": (out_features, r)}

    def quantizer(self, state: AdapterState) -> Quantizer:
        """Rounded by s and b, decoded by s and b + scaling * tBA."""
        A, B = state.low_rank
        assert state.zero is not None
        with torch.autocast(A.device.type, enabled=False):
            zero = torch.addmm(state.zero, B, A, alpha=state.scaling)
        return Quantizer(*state.no_update, state.s, state.zero, state.s, zero)
