"""The numbers of a calibration that a user gets who sets none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a model is calibrated where nothing else is said.

    Training itself needs no numbers of ours: what trains counts in units for which LoRA's learning rates are right,
    see [`TrainedTensor`].

    Attributes:
        calibration_steps: gradient steps on s and the zero, after the fit to the layers' inputs. At small budgets each
            is better spent on training.
        calibration_lr: their learning rate.
        block_steps: those on each decoder layer where it goes by blocks, with the same learning rate.
    """

    calibration_steps: int = 0
    calibration_lr: float = 3e-2
    block_steps: int = 200


RECIPE = Recipe()
