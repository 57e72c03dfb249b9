"""Calibration: fit every layer's scale and zero to data, then freeze them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from ..decoder import NoDecoderLayers
from ..layer import adapter_layers
from ..packing import check_packable, pack_weights
from ..placement import device_of
from ..quant.fit import WEIGHTED
from ..running import random_state_kept
from .blocks import Fit, fit_blocks
from .calibration_batches import cycle
from .calibration_losses import OBJECTIVES, Objective, check_counted, mean_loss
from .calibration_record import By, Calibration
from .gradient import fit_by_gradient
from .grid_training import (
    Stage,
    check_active,
    check_finite,
    check_steps,
    grid_tensors,
    lowest,
    only_grid_trains,
    put_values,
    smallest_over_processes,
    values_of,
)
from .input_moments import fit_to_inputs, input_moments
from .recipe import RECIPE

# Batches on which the inputs are measured, and the gain, before and after.
_MEASURED_BATCHES = 8
# Batches whose hidden states a calibration by blocks keeps.
_MOST_BATCHES = 64

BY: tuple[By, ...] = ("model", "blocks")


def check_arguments(steps: int, lr: float, objective: Objective, by: By, prefix: str = "") -> None:
    """Raises a ValueError for what [`calibrate`] does not know; `prefix` begins the names of the arguments."""
    if objective not in OBJECTIVES:
        raise ValueError(f"{prefix}objective={objective!r} must be one of {', '.join(map(repr, OBJECTIVES))}.")
    if by not in BY:
        raise ValueError(f"{prefix}by={by!r} must be one of {', '.join(map(repr, BY))}.")
    check_steps(steps, lr, prefix)


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

    The fit to the inputs runs the full-precision model on the first 8 batches (fewer if the model is trained for fewer
    steps) and searches each group's grid anew, an error counted by the mean square of the input that it multiplies.
    The gradient steps, if any, go through the straight-through quantizer. With "distill" the loss is the KL divergence
    to the model with its adapters disabled: a teacher that costs a forward pass and no memory. With "task" it is the
    loss that the model returns. Of the grids before, fitted and after, the one of lowest loss is kept.

    Only s and z (or b) move; A, B, m and the base model stay. Under torch.distributed, gradients are averaged over the
    processes, each of which passes its own share of the data. The gradient steps run in the mode (train or eval) that
    the model is in. The global random number generators are left as they were. The result is kept in the adapter's
    config, and so in its model card.

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
            output (as [`calibrate_blocks`] does, on at most 64 batches), which need the gradients of one layer only. A
            model that is no list of decoder layers is calibrated as a whole, on the same batches, with a warning.
        log: called after each step as log(step, {"calibration/loss": ..., "calibration/lr": ...}).

    Returns:
        A [`Calibration`]: the loss before and after.

    Raises:
        ValueError: for an impossible argument, a model without the adapter, or a loader that is empty, or ends early
            and cannot be started again, or whose first batches have no position that counts. The grid is then as it
            was before.
        FloatingPointError: if the loss turns NaN or infinite. The grid is then as it was before.
    """
    check_arguments(steps, lr, objective, by)
    adapter_name, layers = adapter_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr,index,operator]
    check_active(layers.values(), adapter_name)
    check_packable(layers.values(), adapter_name, config)
    grid = [tensor for layer in layers.values() for tensor in grid_tensors(layer, adapter_name)]
    # Blocks take what batches there are, once; steps on the model as many as they need.
    device = device_of(model)
    batches = cycle(dataloader, steps if by == "model" else 0, device)

    with random_state_kept(), only_grid_trains(model, grid) as initial:
        count = min(_MEASURED_BATCHES, steps) if steps and by == "model" else _MEASURED_BATCHES
        first = list(itertools.islice(batches, count))
        # The processes measure together: each as many batches as the one that has the fewest.
        first = first[: smallest_over_processes(len(first), device)]
        check_counted(model, first, device)
        stages: dict[Any, Stage] = {"before": (mean_loss(model, first, objective), initial)}
        check_finite(stages["before"][0], 0, steps, lr)
        if config.init in WEIGHTED:
            fit_to_inputs(layers, input_moments(model, layers, first, progress), adapter_name, config.init)
            stages["fitted"] = (mean_loss(model, first, objective), values_of(grid))
        if steps:
            put_values(grid, lowest(stages.values()))
            training: Iterator[dict[str, Any]] = itertools.chain(first, batches)
            if by == "blocks":
                data = list(itertools.islice(training, _MOST_BATCHES))
                try:
                    fit_blocks(model, data, Fit(adapter_name, steps, lr), progress)
                except NoDecoderLayers:
                    warnings.warn(
                        "the model is no list of decoder layers, each of which takes what the one before it returns; "
                        "it is calibrated as a whole.",
                        stacklevel=2,
                    )
                    by, training = "model", itertools.cycle(data)
            if by == "model":
                fit_by_gradient(model, layers.values(), training, steps, lr, objective, adapter_name, progress, log)
            stages["after"] = (mean_loss(model, first, objective), values_of(grid))
        best = lowest(stages.values())
        put_values(grid, best)
    kept = next(name for name, (_, values) in stages.items() if values is best)
    losses = {name: loss for name, (loss, _) in stages.items()}
    by = by if steps else "model"  # the fit to the inputs alone is the same either way
    result = Calibration(steps, by, objective, losses["before"], losses.get("fitted"), losses[kept], kept)
    config.record["calibration"] = asdict(result)
    pack_weights(model, adapter_name)
    return result
