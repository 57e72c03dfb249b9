"""DLQATCallback: calibration and watching for trouble, inside the Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import DLQATConfig
from ..layer import adapter_layers
from ..packing import pack_weights
from .calibrate import By, Objective, calibrate, check_arguments
from .optimizer import described_parameters
from .recipe import RECIPE
from .report import grid_report

_RECORD = "calibration/record"
# A learning rate that is so many times lower than the recipe's is taken for an oversight.
_FAR_BELOW = 10


class DLQATCallback(TrainerCallback):
    """Calibrates scales and zeros before the first step of a `Trainer` or `SFTTrainer`, and watches the grid after.

    A run resumed from a checkpoint, and an adapter that was calibrated before, are not calibrated again. The loss, the
    gain and the grid's figures go to `trainer.state.log_history`, which checkpoints keep. Gain and figures are printed
    too, a line each. They do not reach TensorBoard and the like: a Trainer gives callbacks no way to its reporters.

    Args:
        calibration_steps: optimiser steps on s and the zero after the fit to the layers' inputs; None to leave the
            first scales and zeros as they are.
        calibration_lr: their learning rate, see [`calibrate`].
        calibration_objective: as `calibrate`'s, whatever the training's own loss is.
        calibration_dataloader: batches for the calibration; the Trainer's own training batches by default.
        calibration_by: "model" or "blocks", see [`calibrate`].
        report_steps: look at the grid every so many training steps, and at the end; 0 for never.

    Raises:
        ValueError: for an impossible argument.

    Example:
        ```py
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[DLQATCallback(calibration_steps=1000)])
        ```
    """

    def __init__(
        self,
        calibration_steps: int | None = RECIPE.calibration_steps,
        calibration_lr: float = RECIPE.calibration_lr,
        calibration_objective: Objective = "distill",
        calibration_dataloader: Iterable[Mapping[str, Any]] | None = None,
        calibration_by: By = "model",
        report_steps: int = 500,
    ) -> None:
        check_arguments(
            calibration_steps or 0, calibration_lr, calibration_objective, calibration_by, prefix="calibration_"
        )
        if not isinstance(report_steps, int) or isinstance(report_steps, bool) or report_steps < 0:
            raise ValueError(f"report_steps={report_steps!r} must be a non-negative integer.")
        self.calibration_steps = calibration_steps
        self.calibration_lr = calibration_lr
        self.calibration_objective = calibration_objective
        self.calibration_dataloader = calibration_dataloader
        self.calibration_by = calibration_by
        self.report_steps = report_steps
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
        adapter_name, layers = adapter_layers(model)
        config: DLQATConfig = model.peft_config[adapter_name]  # type: ignore[union-attr,index,assignment]
        self._warned = False
        _warn_if_magnitude_decays(model, optimizer)
        _warn_if_learning_rate_is_low(model, optimizer)
        if state.global_step > 0:
            # The Trainer has loaded scales and zeros from the checkpoint; its log remembers how they came about.
            for entry in state.log_history:
                if _RECORD in entry:
                    config.record["calibration"] = entry[_RECORD]
            on_full = any(layer.specs[adapter_name].storage == "full" for layer in layers.values())
            if config.storage != "full" and on_full:
                raise ValueError(
                    f"the checkpoint was trained on full weights, and storage={config.storage!r} would change what it "
                    "computes; resume with storage='full', or start a new run in an empty folder."
                )
        if state.global_step > 0 or "calibration" in config.record or self.calibration_steps is None:
            pack_weights(model, adapter_name)
            return
        steps = self.calibration_steps
        every = int(args.logging_steps) if args.logging_steps >= 1 else max(1, steps // 10)

        def log(step: int, values: dict[str, float]) -> None:
            if step % every == 0 or step == steps:
                _keep(state, values, step)

        result = calibrate(
            model,
            train_dataloader if self.calibration_dataloader is None else self.calibration_dataloader,
            steps=steps,
            lr=self.calibration_lr,
            objective=self.calibration_objective,
            adapter_name=adapter_name,
            by=self.calibration_by,
            progress=state.is_world_process_zero and not args.disable_tqdm,
            log=log,
        )
        figures = {"before": result.loss_before, "fitted": result.loss_fitted, "after": result.loss_after}
        known = {f"calibration/loss_{stage}": loss for stage, loss in figures.items() if loss is not None}
        _keep(state, known, steps)
        _say(state, str(result))
        state.log_history.append({_RECORD: config.record["calibration"], "step": 0})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at the grid every `report_steps` steps, and at the last one."""
        if self.report_steps and (state.global_step % self.report_steps == 0 or control.should_training_stop):
            report = grid_report(model)
            figures = report.summary()
            _keep(state, figures, state.global_step)
            line = ", ".join(f"{name.removeprefix('grid/')} {value:.4g}" for name, value in figures.items())
            _say(state, f"grid at step {state.global_step}: {line}")
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
            report = grid_report(model)
            # NaN is the largest of all.
            worst = max(report.layers, key=lambda row: (math.isnan(row.magnitude_max), row.magnitude_max))
            self._warn(
                [
                    f"{worst.name}: {' and '.join(broken)} not finite, and this layer has the largest magnitude "
                    f"({worst.magnitude_max}); lower the learning rates and start from the last checkpoint"
                ]
            )

    def _warn(self, problems: list[str]) -> None:
        if problems and not self._warned:
            self._warned = True
            more = f" (and {len(problems) - 1} more layers; see grid_report)" if len(problems) > 1 else ""
            warnings.warn(f"{problems[0]}{more}.", stacklevel=2)


def _warn_if_magnitude_decays(model: nn.Module, optimizer: Any) -> None:
    magnitudes = {id(parameter) for parameter, tensor in described_parameters(model).items() if not tensor.decays}
    for group in getattr(optimizer, "param_groups", []):
        if group.get("weight_decay") and any(id(parameter) in magnitudes for parameter in group["params"]):
            warnings.warn(
                f"the optimiser decays the magnitudes (weight_decay={group['weight_decay']}), which shrinks every "
                "layer's output; pass optimizers=(create_dlqat_optimizer(model, ...), None) to the Trainer.",
                stacklevel=2,
            )
            return


def _warn_if_learning_rate_is_low(model: nn.Module, optimizer: Any) -> None:
    """The Trainer's default is for weights; B counts steps of the grid, and hardly moves a code with it."""
    of_b = {id(parameter) for name, parameter in model.named_parameters() if ".dlqat_B." in name}
    for group in getattr(optimizer, "param_groups", []):
        # A schedule may begin at 0, or rise to what it calls max_lr; some optimisers find their own.
        lr = max(group.get(key) or 0.0 for key in ("lr", "initial_lr", "max_lr"))
        if 0 < lr < RECIPE.lr(model) / _FAR_BELOW and any(id(parameter) in of_b for parameter in group["params"]):
            warnings.warn(
                f"the learning rate of A and B, {lr:g}, is far below the recipe's {RECIPE.lr(model):.2g} for this "
                "model; raise it, or take arguments = RECIPE.training_arguments(model, output_dir) and "
                "optimizers=(create_dlqat_optimizer(model, torch.optim.AdamW, lr=arguments.learning_rate), None).",
                stacklevel=2,
            )
            return


def _keep(state: TrainerState, values: dict[str, float], step: int) -> None:
    """Add to the log's history; a calibration's `step` is of its own count, before training's first."""
    entry = {**values, "step": state.global_step}
    state.log_history.append(entry if step == state.global_step else {**entry, "calibration_step": step})


def _say(state: TrainerState, line: str) -> None:
    """Print a line once, above the Trainer's progress bar if there is one."""
    if state.is_world_process_zero:
        tqdm.write(line)
