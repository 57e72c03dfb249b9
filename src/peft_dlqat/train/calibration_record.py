"""What a calibration did, in one shape whichever way it went: its result, and what the adapter's config remembers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

By = Literal["model", "blocks"]
Kept = Literal["before", "fitted", "after"]

_LOSSES = {
    "distill": "KL to the full-precision model",
    "task": "loss",
    "output": "mean squared error of the decoder layers' outputs",
}


@dataclass(frozen=True)
class Calibration:
    """What a calibration did.

    Attributes:
        steps: optimiser steps after the fit to the inputs.
        by: "model" or "blocks": whether they went along the model's loss, or each decoder layer's own.
        objective: the loss: "distill", "task" or, of [`calibrate_blocks`], "output", the mean over the decoder layers
            of the mean squared error of their outputs.
        loss_before: mean loss of the initial grid, on the first batches of the loader (of `calibrate_blocks` on all).
        loss_fitted: the same on the grid fitted to the layers' inputs; None where `init` looks at no inputs.
        loss_after: the same on the frozen grid, scales and zero points rounded as they ship.
        kept: the grid of lowest loss, which was kept: "after" the steps, "fitted" to the inputs, or the one "before".
            Of `calibrate_blocks`, whose decoder layers may differ, the latest of these.
    """

    steps: int
    by: By
    objective: Literal["distill", "task", "output"]
    loss_before: float
    loss_fitted: float | None
    loss_after: float
    kept: Kept

    def __str__(self) -> str:
        """One line, with the figures."""
        path = f"{self.loss_before:.4f}"
        path += "" if self.loss_fitted is None else f" -> {self.loss_fitted:.4f} (fitted to inputs)"
        path += f" -> {self.loss_after:.4f} ({self.steps} steps)" if self.steps else ""
        last: Kept = "after" if self.steps else "before" if self.loss_fitted is None else "fitted"
        earlier = {"fitted": "; the steps gained nothing and were undone", "before": "; the initial grid was put back"}
        return f"calibrated: {_LOSSES[self.objective]} {path}{'' if self.kept == last else earlier[self.kept]}"
