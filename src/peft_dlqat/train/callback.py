"""DLQATCallback: calibration and watching for trouble, inside the Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import DLQATConfig
from ..console import say
from ..layer import DLQATLayer, adapter_layers, is_calibrated
from ..model import DLQATModel, check_what_was_loaded
from ..packing import pack_weights
from .calibrate import By, Objective, calibrate, check_arguments, default_steps
from .recipe import RECIPE
from .reference import REFERENCE, full_precision_reference
from .report import grid_report
from .trainer_batches import TrainerBatches, order_kept, problem


class DLQATCallback(TrainerCallback):
    """Calibrates scales and zeros before the first step of a `Trainer` or TRL trainer, and watches the grid after.

    A run resumed from a checkpoint, and an adapter that was calibrated before, are not calibrated again. Where the
    training batches are nothing to calibrate on (prompts alone, or a stream that is read once), a warning says so, and
    scales and zeros stay as they were fitted to the weights, or are fitted to `calibration_dataloader`. TRL's
    reference, a copy of the adapter named "ref", gets the same scales and zeros.

    The loss, the gain and the grid's figures go to `trainer.state.log_history`, which checkpoints keep. Gain and
    figures are printed too, a line each. They do not reach TensorBoard and the like: a Trainer gives callbacks no way
    to its reporters.

    Args:
        calibration_steps: optimiser steps on s and the zero after the fit to the layers' inputs; the recipe's by
            default, as of [`calibrate`]: none on the model, 200 on each decoder layer.
        calibration_lr: their learning rate, see [`calibrate`].
        calibration_objective: as `calibrate`'s, whatever the training's own loss is.
        calibration_dataloader: batches for the calibration, dicts of the model's arguments; the Trainer's own training
            batches by default.
        calibration_by: "model" or "blocks", see [`calibrate`].
        report_steps: look at the grid every so many training steps, and at the end; 0 for never.
        calibration: False to leave the first scales and zeros as they are.

    Raises:
        ValueError: for an impossible argument.

    Example:
        ```py
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[DLQATCallback()])
        ```
    """

    def __init__(
        self,
        calibration_steps: int | None = None,
        calibration_lr: float = RECIPE.calibration_lr,
        calibration_objective: Objective = "distill",
        calibration_dataloader: Iterable[Mapping[str, Any]] | None = None,
        calibration_by: By = "model",
        report_steps: int = 500,
        calibration: bool = True,
    ) -> None:
        check_arguments(
            calibration_steps, calibration_lr, calibration_objective, calibration_by, prefix="calibration_"
        )
        if not isinstance(report_steps, int) or isinstance(report_steps, bool) or report_steps < 0:
            raise ValueError(f"report_steps={report_steps!r} must be a non-negative integer.")
        self.calibration_steps = calibration_steps
        self.calibration_lr = calibration_lr
        self.calibration_objective = calibration_objective
        self.calibration_dataloader = calibration_dataloader
        self.calibration_by = calibration_by
        self.report_steps = report_steps
        self.calibration = calibration
        self._warned = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Calibrate, unless that was done before."""
        check_what_was_loaded(model)
        adapter_name, layers = adapter_layers(model)
        config: DLQATConfig = model.peft_config[adapter_name]  # type: ignore[union-attr,index,assignment]
        self._warned = False
        if any(layer.merged for layer in layers.values()):
            raise ValueError(
                f"adapter {adapter_name!r} is merged into the base model, where it does not train; call "
                "unmerge_adapter() first."
            )
        if state.global_step > 0:
            converted = any(adapter_name in layer.converted for layer in layers.values())
            if converted and getattr(optimizer, "state", None):
                raise ValueError(
                    "the checkpoint is of an older version: its adapter has been brought into the units of this one, "
                    "but its optimizer's learning rate and state are in the old ones; load the adapter by "
                    "PeftModel.from_pretrained(..., is_trainable=True), and start a new run in an empty folder."
                )
            on_full = any(layer.specs[adapter_name].storage == "full" for layer in layers.values())
            if config.storage != "full" and on_full:
                raise ValueError(
                    f"the checkpoint was trained on full weights, and storage={config.storage!r} would change what it "
                    "computes; resume with storage='full', or start a new run in an empty folder."
                )
        elif full_precision_reference(args, model.peft_config):  # type: ignore[arg-type]
            say(
                "the reference is the model with its adapter off, in full precision; for a quantized one give the "
                "trainer get_peft_model(model, config) in the place of peft_config=.",
            )
        if state.global_step == 0 and self.calibration and not is_calibrated(layers.values(), adapter_name):
            with order_kept(train_dataloader):
                self._calibrate(args, state, model, adapter_name, train_dataloader)
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, DLQATModel):
            tuner._warned.add(adapter_name)  # what is to be said of a model that was not calibrated has been said
        pack_weights(model, adapter_name)

    def _calibrate(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, adapter_name: str, train_dataloader: Any
    ) -> None:
        """Calibrate, or say why not."""
        if getattr(args, "precompute_ref_log_probs", False) and REFERENCE in model.peft_config:  # type: ignore[operator]
            _not_calibrated(
                "precompute_ref_log_probs=True has run the reference already, with scales and zeros as they are",
                "call calibrate(model, ...) before the trainer is made",
            )
            return
        batches: Any = self.calibration_dataloader
        if batches is None:
            reason = problem(model, train_dataloader)
            if reason:
                _not_calibrated(
                    reason, "pass calibration_dataloader=, batches such as {'input_ids': ..., 'attention_mask': ...}"
                )
                return
            batches = TrainerBatches(model, train_dataloader)
        steps = default_steps(self.calibration_by) if self.calibration_steps is None else self.calibration_steps
        every = int(args.logging_steps) if args.logging_steps >= 1 else max(1, steps // 10)

        def log(step: int, values: dict[str, float]) -> None:
            if step % every == 0 or step % steps == 0:
                _keep(state, values, step)

        result = calibrate(
            model,
            batches,
            steps=steps,
            lr=self.calibration_lr,
            objective=self.calibration_objective,
            adapter_name=adapter_name,
            by=self.calibration_by,
            progress=not args.disable_tqdm,
            log=log,
        )
        figures = {"before": result.loss_before, "fitted": result.loss_fitted, "after": result.loss_after}
        known = {f"calibration/loss_{stage}": loss for stage, loss in figures.items() if loss is not None}
        _keep(state, known, steps)
        say(str(result))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at the grid every `report_steps` steps, and at the last one."""
        if self.report_steps and (state.global_step % self.report_steps == 0 or control.should_training_stop):
            report = grid_report(model)
            figures = report.summary()
            _keep(state, figures, state.global_step)
            line = ", ".join(f"{name.removeprefix('grid/')} {value:.4g}" for name, value in figures.items())
            say(f"grid at step {state.global_step}: {line}")
            self._warn(report.problems)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say which layer to look at when the loss or its gradient is no number any more."""
        # The Trainer's `logging_nan_inf_filter`, on by default, logs a NaN loss as a number, not so grad_norm.
        broken = [key for key in ("loss", "grad_norm") if not math.isfinite((logs or {}).get(key, 0.0))]
        if broken:
            name, why = _most_suspect(model)
            self._warn(
                [
                    f"{name}: {' and '.join(broken)} not finite, and {why}; lower the learning rate and start from "
                    "the last checkpoint"
                ]
            )

    def _warn(self, problems: list[str]) -> None:
        if problems and not self._warned:
            self._warned = True
            more = f" (and {len(problems) - 1} more layers; see grid_report)" if len(problems) > 1 else ""
            warnings.warn(f"{problems[0]}{more}.", stacklevel=2)


def _not_calibrated(reason: str, remedy: str) -> None:
    warnings.warn(
        f"not calibrated: {reason}. Scales and zeros stay as fitted to the weights; to fit them to data, {remedy}.",
        stacklevel=2,
    )


def _most_suspect(model: nn.Module) -> tuple[str, str]:
    """The layer to look at when training has broken, and why: NaN in a trained tensor, or the one moved farthest."""
    adapter_name, layers = adapter_layers(model)
    moves = {name: _moved_by(layer, adapter_name) for name, layer in layers.items()}
    name = max(moves, key=lambda name: moves[name])  # the first of those that hold NaN
    infinite, distance, what = moves[name]
    if infinite:
        broken = sum(infinite for infinite, *_ in moves.values())
        return name, f"its {what} holds NaN or infinity, as {broken} of {len(moves)} layers do"
    return name, f"its {what} has moved farthest from the start, by {distance:.3g}"


def _moved_by(layer: DLQATLayer, adapter_name: str) -> tuple[bool, float, str]:
    """Of the layer's trained tensor that is farthest from its start: whether it is infinite, how far, and its name."""
    moves = []
    for name, (tensor, parameter) in layer.trained(adapter_name).items():
        distance = tensor.unit * parameter.detach().abs().max().item()
        # A tensor drawn at random tells nothing of how far it has moved.
        moves.append((not math.isfinite(distance), distance if tensor.start is not None else 0.0, name))
    return max(moves)


def _keep(state: TrainerState, values: dict[str, float], step: int) -> None:
    """Add to the log's history; a calibration's `step` is of its own count, before training's first."""
    entry = {**values, "step": state.global_step}
    state.log_history.append(entry if step == state.global_step else {**entry, "calibration_step": step})
