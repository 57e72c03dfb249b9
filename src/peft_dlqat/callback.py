"""DLQATCallback: calibration and watching for trouble, inside the Trainer."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from .calibrate import Calibration, Objective, calibrate
from .card import write_section
from .config import DLQATConfig
from .layer import adapter_layers
from .report import grid_report

_RECORD = "calibration/record"


class DLQATCallback(TrainerCallback):
    """Calibrates the grid before the first optimiser step of a `Trainer` or `SFTTrainer`, and watches it after.

    A run resumed from a checkpoint, and an adapter that was calibrated before, are not calibrated again. The loss, the
    gain and the grid's figures go to the Trainer's log, and so to TensorBoard and the like.

    Args:
        calibration_steps: optimiser steps on s and the zero; 0 to train on the initial grid.
        lr: learning rate of the calibration, see [`calibrate`].
        objective: "distill" or "task".
        dataloader: batches for the calibration; the Trainer's own training batches by default.
        report_steps: look at the grid every so many training steps, and at the end; 0 for never.

    Example:
        ```py
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[DLQATCallback(calibration_steps=1000)])
        ```
    """

    def __init__(
        self,
        calibration_steps: int = 1000,
        lr: float = 3e-2,
        objective: Objective = "distill",
        dataloader: Iterable[Mapping[str, Any]] | None = None,
        report_steps: int = 500,
    ) -> None:
        for name, value in (("calibration_steps", calibration_steps), ("report_steps", report_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r} must be a non-negative integer; 0 switches it off.")
        self.calibration_steps = calibration_steps
        self.lr = lr
        self.objective = objective
        self.dataloader = dataloader
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
        adapter_name, _ = adapter_layers(model)
        config: DLQATConfig = model.peft_config[adapter_name]  # type: ignore[union-attr,index,assignment]
        _keep_card_section(model)
        _warn_if_magnitude_decays(model, optimizer)
        if state.global_step > 0:
            # The Trainer has loaded the grid from the checkpoint; its log remembers how it came about.
            for entry in state.log_history:
                if _RECORD in entry:
                    config.record["calibration"] = entry[_RECORD]
            return
        if "calibration" in config.record:
            return
        if self.calibration_steps == 0:
            return
        handler = _calling_handler()
        every = max(1, args.logging_steps) if args.logging_steps >= 1 else max(1, self.calibration_steps // 10)

        def log(step: int, values: dict[str, Any]) -> None:
            if step % every == 0 or step == self.calibration_steps or "calibration/loss" not in values:
                state.log_history.append({**values, "step": 0, "calibration_step": step})
                if handler is not None and state.is_world_process_zero:
                    at_step = copy.copy(state)
                    at_step.global_step = step
                    shown = {name: value for name, value in values.items() if name != _RECORD}
                    handler.on_log(args, at_step, control, shown)

        result: Calibration = calibrate(
            model,
            train_dataloader if self.dataloader is None else self.dataloader,
            steps=self.calibration_steps,
            lr=self.lr,
            objective=self.objective,
            adapter_name=adapter_name,
            progress=state.is_world_process_zero and not args.disable_tqdm,
            log=log,
        )
        log(
            self.calibration_steps,
            {
                "calibration/loss_before": result.loss_before,
                "calibration/loss_after": result.loss_after,
                _RECORD: config.record["calibration"],
            },
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at the grid every `report_steps` steps."""
        if self.report_steps and state.global_step % self.report_steps == 0:
            self._report(args, state, control, model, _calling_handler())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at the grid once more."""
        if self.report_steps and state.global_step % self.report_steps != 0:
            self._report(args, state, control, model, _calling_handler())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say which layer to look at when the loss is no number any more."""
        loss = (logs or {}).get("loss")
        if isinstance(loss, float) and not math.isfinite(loss):
            report = grid_report(model)
            worst = max(
                report.layers,
                key=lambda row: abs(row.magnitude_max) if row.magnitude_max == row.magnitude_max else math.inf,
            )
            self._warn(
                [
                    f"{worst.name}: the loss is {loss}, and this layer has the largest magnitude "
                    f"({worst.magnitude_max}); lower the learning rates, start from the last checkpoint"
                ]
            )

    def _report(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        handler: CallbackHandler | None,
    ) -> None:
        report = grid_report(model)
        state.log_history.append({**report.summary(), "step": state.global_step})
        if handler is not None and state.is_world_process_zero:
            handler.on_log(args, state, control, report.summary())
        self._warn(report.problems)

    def _warn(self, problems: list[str]) -> None:
        if problems and not self._warned:
            self._warned = True
            more = f" (and {len(problems) - 1} more layers; see grid_report)" if len(problems) > 1 else ""
            warnings.warn(f"{problems[0]}{more}.", stacklevel=2)


def _calling_handler() -> CallbackHandler | None:
    """The Trainer's callback handler, two frames up.

    The Trainer gives its callbacks no way to log, and what is logged must reach *its* reporters: a second TensorBoard
    writer or wandb run beside them would split the curves.
    """
    frame = sys._getframe(2)
    handler = frame.f_locals.get("self")
    return handler if isinstance(handler, CallbackHandler) else None


def _warn_if_magnitude_decays(model: nn.Module, optimizer: Any) -> None:
    magnitudes = {id(p) for name, p in model.named_parameters() if ".dlqat_magnitude." in name}
    for group in getattr(optimizer, "param_groups", []):
        if group.get("weight_decay") and any(id(parameter) in magnitudes for parameter in group["params"]):
            warnings.warn(
                f"the optimiser decays the magnitudes (weight_decay={group['weight_decay']}), which shrinks every "
                "layer's output; pass optimizers=(create_dlqat_optimizer(model, ...), None) to the Trainer.",
                stacklevel=2,
            )
            return


def _keep_card_section(model: nn.Module) -> None:
    """Let the card that `Trainer.push_to_hub` writes anew keep this package's section."""
    if isinstance(model, PeftModel) and "create_or_update_model_card" not in vars(model):
        model.create_or_update_model_card = partial(_update_card, model)  # type: ignore[method-assign]


def _update_card(model: PeftModel, output_dir: str) -> None:
    type(model).create_or_update_model_card(model, output_dir)
    for config in model.peft_config.values():
        if isinstance(config, DLQATConfig):
            write_section(output_dir, config)
