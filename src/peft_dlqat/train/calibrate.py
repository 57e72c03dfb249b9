"""Calibration: fit every layer's scales and zeros to data, then freeze them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ..config import DLQATConfig
from ..console import progress_bar
from ..decoder import NoDecoderLayers
from ..layer import adapter_layers
from ..model import check_what_was_loaded
from ..packing import check_packable, pack_weights
from ..placement import is_partitioned
from ..quant.fit import WEIGHTED
from ..running import gives_distribution, random_state_kept
from .blocks import BlockError, calibrate_by_blocks
from .descent import Descent, Log, Stage, check_steps, keep_lowest
from .fit_to_inputs import fit_to_inputs, input_moments
from .model_loss import ModelLoss, ModelObjective
from .recipe import RECIPE
from .reference import REFERENCE, is_reference, renew_reference
from .scales_and_zeros import check_movable, only_these_train
from .used_layers import all_layers_used

By = Literal["model", "blocks"]
Objective = Literal["distill", "task", "output"]

# What was compared: of a head that gives no distribution, "distill" compares the logits themselves.
Compared = Objective | Literal["logits"]

_WHAT_IT_IS: dict[Compared, str] = {
    "distill": "KL to the full-precision model",
    "logits": "mean squared difference to the full-precision model's logits",
    "task": "loss",
    "output": "mean squared error of the decoder layers' outputs",
}
_BY: tuple[By, ...] = ("model", "blocks")

# Batches on which the inputs are measured, and the gain, before and after.
_MEASURED_BATCHES = 8
# Batches whose hidden states steps by blocks keep where the model's loss is compared.
_MOST_BATCHES = 64


@dataclass(frozen=True)
class Calibration:
    """What a calibration did.

    Attributes:
        steps: optimiser steps after the fit to the inputs; by blocks, on each decoder layer.
        by: "model" or "blocks": whether they went along the model's loss, or each decoder layer's own.
        objective: the loss that was compared: "distill", "task", "output", the mean over the decoder layers of the
            mean squared error of their outputs, or "logits", which is "distill" for a head that gives no distribution.
        loss_before: mean loss with the initial scales and zeros, on the first batches ("output": on all).
        loss_fitted: the same with those fitted to the layers' inputs; None where `init` looks at no inputs.
        loss_after: the same with those that were kept, rounded as they ship.
        kept: the stage of lowest loss, which was kept: "after" the steps, "fitted" to the inputs, or "before". Of
            "output", where decoder layers may differ, the latest of these.
        blocks: what happened to each decoder layer, by blocks.
    """

    steps: int
    by: By
    objective: Compared
    loss_before: float
    loss_fitted: float | None
    loss_after: float
    kept: Stage
    blocks: tuple[BlockError, ...] = ()

    @classmethod
    def of_outputs(cls, steps: int, blocks: list[BlockError]) -> Calibration:
        """The means over decoder layers that were calibrated one by one."""

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        fitted = [block.fitted for block in blocks if block.fitted is not None]
        latest_first: tuple[Stage, ...] = ("after", "fitted", "before")
        return cls(
            steps,
            "blocks",
            "output",
            mean([block.before for block in blocks]),
            mean(fitted) if fitted else None,
            mean([block.after for block in blocks]),
            next(stage for stage in latest_first if any(block.kept == stage for block in blocks)),
            tuple(blocks),
        )

    def __str__(self) -> str:
        """One line, with the figures."""
        path = f"{self.loss_before:.4f}"
        path += "" if self.loss_fitted is None else f" -> {self.loss_fitted:.4f} (fitted to inputs)"
        path += f" -> {self.loss_after:.4f} ({self.steps} steps)" if self.steps else ""
        last: Stage = "after" if self.steps else "before" if self.loss_fitted is None else "fitted"
        earlier = {
            "fitted": "; the steps gained nothing and were undone",
            "before": "; the initial scales and zeros were put back",
        }
        return f"calibrated: {_WHAT_IT_IS[self.objective]} {path}{'' if self.kept == last else earlier[self.kept]}"


def calibrate(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    steps: int | None = None,
    lr: float = RECIPE.calibration_lr,
    objective: Objective = "distill",
    adapter_name: str | None = None,
    progress: bool = True,
    by: By = "model",
    train_adapter: bool = False,
    cache_dir: str | Path | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> Calibration:
    """Fit scales and zeros of all layers to data, then freeze them: first to the layers' inputs, then by gradient.

    The fit to the inputs runs the full-precision model on the first 8 batches (fewer if the model is trained for fewer
    steps) and searches each group's scale and zero anew, an error counted by the mean square of the input that it
    multiplies. The gradient steps, if any, go through the straight-through quantizer. Of the values before, fitted and
    after, those of the lowest loss are kept. Then the weights are packed, as the config's `storage` says
    ([`pack_weights`]).

    Only s and z (or b) move, unless `train_adapter` says otherwise. Under torch.distributed, gradients are averaged
    over the processes, each of which passes its own share of the data. Random number generators, modes and
    `requires_grad` are left as they were. The result goes to the adapter's config, and so to its model card. A copy of
    the adapter that is TRL's reference, by the name "ref", stays its copy.

    Steps by blocks need the gradients of one decoder layer only, and two copies of all batches' hidden states. They
    run in eval mode, those on the whole model in the mode that it is in. Padding, where an attention mask [batch,
    length] shows it, does not count.

    Args:
        model: a model with a DL-QAT adapter, from `get_peft_model` or transformers' `add_adapter`.
        dataloader: batches, each a dict of the model's keyword arguments; for steps on the model started again when it
            ends.
        steps: optimiser steps after the fit to the inputs, by blocks on each decoder layer; the recipe's by default
            (0 on the model, 200 by blocks).
        lr: learning rate at the start, falling linearly to 0, in each tensor's own unit: for s and b a layer's mean
            scale, for z one code.
        objective: the loss that decides what is kept. "distill": the KL divergence to the model with its adapters
            disabled, a teacher that costs a forward pass and no memory; the mean squared difference of the logits
            where a head gives no distribution (regression, a reward). "task": the loss that the model returns.
            "output", only by blocks: each decoder layer's own error, on all batches; the whole model never runs.
        adapter_name: the adapter to calibrate; defaults to the active one.
        progress: show progress bars.
        by: "model" for steps along the whole model's loss; "blocks" for steps on each decoder layer's own output, on
            at most 64 batches (all with "output"). A model that is no list of decoder layers is calibrated as a whole,
            on the same batches, with a warning.
        train_adapter: fit A, B, m and the shift along with scales and zeros.
        cache_dir: an existing folder to keep hidden states in meanwhile, rather than in memory; only by blocks.
            What a killed run leaves there, `.hidden-states-*`, is to be removed by hand.
        log: called after each step as log(step, {"calibration/loss": ..., "calibration/lr": ...}); by blocks, the loss
            is the decoder layer's, and steps count on over these.

    Returns:
        A [`Calibration`]: the loss before and after, and by blocks what happened to each decoder layer.

    Raises:
        NoDecoderLayers: a ValueError; with "output", for a model that is no list of decoder layers.
        ValueError: for an impossible argument, a model without the adapter, an adapter layer that the model passes by,
            or a loader that is empty, or ends early
            and cannot be started again, or whose batches have no position that counts; for `train_adapter` with packed
            storage, which would change what was fitted. Scales and zeros are then as they were before.
        FloatingPointError: if the loss turns NaN or infinite. Scales and zeros are then as they were before.

    Example:
        ```py
        >>> print(calibrate(model, batches))
        >>> by_blocks = calibrate(model, batches, by="blocks", objective="output", train_adapter=True)
        ```
    """
    check_arguments(steps, lr, objective, by)
    if cache_dir is not None and by == "model":
        raise ValueError(f"cache_dir={str(cache_dir)!r} keeps hidden states, which only by='blocks' has; add that.")
    if cache_dir is not None and not Path(cache_dir).is_dir():
        raise ValueError(f"cache_dir={str(cache_dir)!r} is no folder; make it first.")
    check_what_was_loaded(model)
    adapter_name, layers = adapter_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr,index,operator]
    descent = Descent(adapter_name, default_steps(by) if steps is None else steps, lr, train_adapter)
    check_trains_what_stays(descent, config)
    check_movable(layers.values(), adapter_name)
    check_packable(layers.values(), adapter_name, config)
    has_reference = is_reference(layers.values(), adapter_name)
    others = {name for layer in layers.values() for name in layer.specs} - {adapter_name}
    if config.storage != "full" and others - ({REFERENCE} if has_reference else set()):
        raise ValueError(
            f"storage={config.storage!r} packs the frozen weights by the scales of {adapter_name!r}, and there are "
            f"adapters with others: {sorted(others)}; delete them, or use storage='full'."
        )

    def report(step: int, value: float, lr: float) -> None:
        if log is not None:
            log(step, {"calibration/loss": value, "calibration/lr": lr})

    moving = only_these_train(model, descent.tensors(layers.values()))
    with random_state_kept(), moving, all_layers_used(model, layers):
        if objective == "output":
            blocks = calibrate_by_blocks(model, dataloader, descent, config.init, progress, cache_dir, report)
            result = Calibration.of_outputs(descent.steps, blocks)
        else:
            measured = min(_MEASURED_BATCHES, descent.steps) if descent.steps and by == "model" else _MEASURED_BATCHES
            # Blocks take what batches there are, once; steps on the model as many as they need.
            compared: ModelObjective = objective
            if objective == "distill" and not gives_distribution(model):
                compared = "logits"
            loss = ModelLoss(model, compared, dataloader, measured, descent.steps if by == "model" else 0)
            result = _on_model_loss(model, loss, descent, config.init, compared, by, progress, cache_dir, report)
    for layer in layers.values():
        layer.set_record(adapter_name, calibrated=True)
        if layer.record(adapter_name).dtype != layer.frozen.dtype and not is_partitioned(
            layer.get_base_layer().weight
        ):
            own = layer.base_record()  # the model was cast since the adapter was made
            layer.set_record(adapter_name, dtype=own.dtype, checksum=own.checksum)
    if has_reference:
        renew_reference(layers.values(), adapter_name)
    pack_weights(model, adapter_name)
    return result


def _on_model_loss(
    model: nn.Module,
    loss: ModelLoss,
    descent: Descent,
    init: str,
    objective: ModelObjective,
    by: By,
    progress: bool,
    cache_dir: str | Path | None,
    log: Log,
) -> Calibration:
    """Calibrate where the whole model's loss decides what is kept, whichever way the steps go."""
    layers = adapter_layers(model, descent.adapter_name)[1]
    blocks: list[BlockError] = []

    def fit() -> None:
        moments = input_moments(model, layers, loss.measured, progress)
        fit_to_inputs(layers, moments, descent.adapter_name, init, progress)

    def descend() -> None:
        nonlocal by
        if by == "blocks":
            batches = list(itertools.islice(loss.training, _MOST_BATCHES))
            try:  # what is fitted to the inputs is so already
                blocks.extend(calibrate_by_blocks(model, batches, descent, None, progress, cache_dir, log))
                return
            except NoDecoderLayers:
                warnings.warn(
                    "the model is no list of decoder layers, each of which takes what the one before it returns; "
                    "it is calibrated as a whole.",
                    stacklevel=5,
                )
                by, loss.training = "model", itertools.cycle(batches)
        with progress_bar(total=descent.steps, desc="calibrating", shown=progress) as bar:

            def after_step(step: int, value: float, lr: float) -> None:
                bar.update()
                bar.set_postfix(loss=f"{value:.4f}")
                log(step, value, lr)

            descent.run(loss, layers.values(), after_step)

    before, fitted, after, kept = keep_lowest(
        loss,
        descent.tensors(layers.values()),
        fit if init in WEIGHTED else None,
        descend if descent.steps else None,
    )
    by = by if descent.steps else "model"  # the fit to the inputs alone is the same either way
    return Calibration(descent.steps, by, objective, before, fitted, after, kept, tuple(blocks))


def default_steps(by: By) -> int:
    """The recipe's optimiser steps: on the model, or on each decoder layer."""
    return RECIPE.block_steps if by == "blocks" else RECIPE.calibration_steps


def check_arguments(steps: int | None, lr: float, objective: Objective, by: By, prefix: str = "") -> None:
    """Raises a ValueError for what [`calibrate`] does not know; `prefix` begins the names of the arguments."""
    if objective not in get_args(Objective):
        raise ValueError(
            f"{prefix}objective={objective!r} must be one of {', '.join(map(repr, get_args(Objective)))}."
        )
    if by not in _BY:
        raise ValueError(f"{prefix}by={by!r} must be one of {', '.join(map(repr, _BY))}.")
    if objective == "output" and by == "model":
        raise ValueError(
            f"{prefix}objective='output' is each decoder layer's own error; add {prefix}by='blocks', or use 'distill'."
        )
    check_steps(0 if steps is None else steps, lr, prefix)


def check_trains_what_stays(descent: Descent, config: DLQATConfig) -> None:
    """Raises a ValueError if A, B and m would not be fitted, or to weights that are to be packed afterwards."""
    if descent.train_adapter and not descent.steps:
        raise ValueError("train_adapter=True fits A, B and m by gradient steps, but steps=0; pass steps=200, say.")
    if descent.train_adapter and config.storage != "full":
        raise ValueError(
            f"train_adapter=True with storage={config.storage!r}: A, B and m would be fitted to full weights, and "
            "packing these then changes the codes; leave one of the two out."
        )
