"""Calibration: fit every layer's scale and zero to data, then freeze them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from ..layer import adapter_layers
from ..packing import pack_weights
from ..placement import device_of
from ..recipe import RECIPE
from .activations import fit_to_inputs, input_moments
from .blocks import calibrate_blocks
from .data import cycle
from .decoder import has_decoder_layers
from .gradient import fit_by_gradient
from .grid_state import (
    Stage,
    check_active,
    check_finite,
    check_steps,
    grid_tensors,
    lowest,
    only_grid_trains,
    put_values,
    random_state_kept,
    smallest_over_processes,
    values_of,
)
from .losses import OBJECTIVES, Objective, mean_loss

# Batches on which the inputs are measured, and the gain, before and after.
_MEASURED_BATCHES = 8
# Batches whose hidden states a calibration by blocks keeps.
_MOST_BATCHES = 64

By = Literal["model", "blocks"]
BY: tuple[By, ...] = ("model", "blocks")


@dataclass(frozen=True)
class Calibration:
    """What a calibration did.

    Attributes:
        steps: optimiser steps after the fit to the inputs.
        objective: "distill" or "task".
        loss_before: mean loss of the initial grid on the first batches of the loader.
        loss_fitted: the same on the grid fitted to the layers' inputs.
        loss_after: the same on the frozen grid, scales and zero points rounded as they ship.
        kept: the grid of lowest loss, which was kept: "after" the steps, "fitted" to the inputs, or the one "before".
    """

    steps: int
    objective: Objective
    loss_before: float
    loss_fitted: float
    loss_after: float
    kept: Literal["before", "fitted", "after"]

    def __str__(self) -> str:
        """One line, with the figures."""
        loss = "KL to the full-precision model" if self.objective == "distill" else "loss"
        path = f"{self.loss_before:.4f} -> {self.loss_fitted:.4f} (fitted to inputs)"
        path += f" -> {self.loss_after:.4f} ({self.steps} steps)" if self.steps else ""
        earlier = {"fitted": "; the steps gained nothing and were undone", "before": "; the initial grid was put back"}
        return f"calibrated: {loss} {path}{'' if self.kept == _last(self.steps) else earlier[self.kept]}"


def _last(steps: int) -> str:
    """The last stage of a calibration."""
    return "after" if steps else "fitted"


def calibrate(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    steps: int = RECIPE.calibration_steps,
    lr: float = RECIPE.calibration_lr,
    objective: Objective = "distill",
    adapter_name: str | None = None,
    progress: bool = True,
    by: By = "model",
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> Calibration:
    """Fit scale and zero of all layers to data, then freeze them: first to the layers' inputs, then by gradient.

    The fit to the inputs runs the full-precision model on the first 8 batches and searches each group's grid anew, an
    error counted by the mean square of the input that it multiplies. The gradient steps, if any, go through the
    straight-through quantizer. With "distill" the loss is the KL divergence to the model with its adapters disabled:
    a teacher that costs a forward pass and no memory. With "task" it is the loss that the model returns. Of the grids
    before, fitted and after, the one of lowest loss is kept.

    Only s and z (or b) move; A, B, m and the base model stay. Under torch.distributed, gradients are averaged over the
    processes, each of which passes its own share of the data. The gradient steps run in the mode (train or eval) that
    the model is in. Random number generators are left as they were. The result is kept in the adapter's config, and so
    in its model card.

    Args:
        model: a model with a DL-QAT adapter, from `get_peft_model` or transformers' `add_adapter`.
        dataloader: batches, each a dict of the model's keyword arguments; started again when it ends.
        steps: optimiser steps after the fit to the inputs.
        lr: learning rate at the start, falling linearly to 0; a share of each layer's mean scale for s and b, and of
            one code for z.
        objective: "distill" or "task".
        adapter_name: the adapter to calibrate; defaults to the active one.
        progress: show progress bars.
        by: "model" for steps along the whole model's loss; "blocks" for as many steps on each decoder layer's own
            output ([`calibrate_blocks`], on at most 64 batches), which need the gradients of one layer only. A model
            without a list of decoder layers is calibrated as a whole, with a warning.
        log: called after each step as log(step, {"calibration/loss": ..., "calibration/lr": ...}).

    Returns:
        A [`Calibration`]: the loss before and after.

    Raises:
        ValueError: for an impossible argument, a model without the adapter, or a loader that is empty, or ends early
            and cannot be started again. The grid is then as it was before.
        FloatingPointError: if the loss turns NaN or infinite. The grid is then as it was before.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} must be one of {', '.join(map(repr, OBJECTIVES))}.")
    if by not in BY:
        raise ValueError(f"by={by!r} must be one of {', '.join(map(repr, BY))}.")
    check_steps(steps, lr)
    adapter_name, layers = adapter_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr,index,operator]
    check_active(layers.values(), adapter_name)
    if by == "blocks" and steps and not has_decoder_layers(model, adapter_name):
        warnings.warn("the model has no list of decoder layers; it is calibrated as a whole.", stacklevel=2)
        by = "model"
    grid = [tensor for layer in layers.values() for tensor in grid_tensors(layer, adapter_name)]
    # Blocks take what batches there are, once; steps on the model as many as they need.
    device = device_of(model)
    batches = cycle(dataloader, steps if by == "model" else 0, device)

    with random_state_kept(), only_grid_trains(model, grid) as initial:
        count = min(_MEASURED_BATCHES, steps) if steps and by == "model" else _MEASURED_BATCHES
        first = list(itertools.islice(batches, count))
        # The processes measure together: each as many batches as the one that has the fewest.
        first = first[: smallest_over_processes(len(first), device)]
        stages: dict[Any, Stage] = {"before": (mean_loss(model, first, objective), initial)}
        check_finite(stages["before"][0], 0, steps, lr)
        fit_to_inputs(layers, input_moments(model, layers, first, progress), adapter_name, config.init)
        stages["fitted"] = (mean_loss(model, first, objective), values_of(grid))
        if steps:
            put_values(grid, lowest(stages.values()))
            training = itertools.chain(first, batches)
            if by == "blocks":
                data = list(itertools.islice(training, _MOST_BATCHES))
                calibrate_blocks(model, data, steps, lr, adapter_name, progress)
            else:
                fit_by_gradient(model, layers.values(), training, steps, lr, objective, adapter_name, progress, log)
            stages["after"] = (mean_loss(model, first, objective), values_of(grid))
        best = lowest(stages.values())
        put_values(grid, best)
    kept = next(name for name, (_, values) in stages.items() if values is best)
    losses = {name: loss for name, (loss, _) in stages.items()}
    result = Calibration(steps, objective, losses["before"], losses["fitted"], losses[kept], kept)
    config.record["calibration"] = asdict(result)
    pack_weights(model, adapter_name)
    return result
