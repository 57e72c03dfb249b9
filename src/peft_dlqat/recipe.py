"""The default recipe: one object with the numbers that a user gets who sets only `bits`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainingArguments


@dataclass(frozen=True)
class Recipe:
    """How a model is calibrated and trained where nothing else is said.

    The defaults of [`calibrate`], [`DLQATCallback`] and [`create_dlqat_optimizer`] are those of `RECIPE`; what has to
    be a Trainer's own comes from `training_arguments`. The numbers were found by 800 steps of distillation on a model
    of 260 k parameters. A few hundred steps of fine-tuning on text of another kind want several times the learning
    rate of A and B, and the magnitude's not above theirs (`examples/arguments.py`). For wide models the rate falls
    with the width, which is a guess: at LLaMA-7B's it is 9e-4, near the 1e-3 (same unit) of LR-QAT's published runs.

    Attributes:
        calibration_steps: gradient steps on s and the zero, after the fit to the layers' inputs. At small budgets each
            is better spent on training.
        calibration_lr: their learning rate.
        learning_rate: of A and B, the latter in units of the step, for models of up to `reference_width` hidden units.
        reference_width: beyond it, the learning rate falls as 1 / width.
        magnitude_factor: the learning rate of m and shift is so many times that of A and B; less for L4Q, whose m
            rounds.
        warmup: share of the steps in which the learning rate rises.
        schedule: transformers' name of what it does then: it falls to 0 as the square of the steps left, and gives the
            codes time to settle.
        schedule_arguments: arguments of the schedule.
    """

    calibration_steps: int = 0
    calibration_lr: float = 3e-2
    learning_rate: float = 1.4e-2
    reference_width: int = 256
    magnitude_factor: float = 6.0
    warmup: float = 0.025
    schedule: str = "polynomial"
    schedule_arguments: tuple[tuple[str, float], ...] = (("power", 2.0), ("lr_end", 0.0))

    def lr(self, model: nn.Module) -> float:
        """Learning rate of A and B for a model, by its hidden size; for one without, that of the narrowest."""
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(config, "hidden_size", None) or self.reference_width
        return self.learning_rate * min(1.0, self.reference_width / width)

    def training_arguments(self, model: nn.Module, output_dir: str, **kwargs: Any) -> TrainingArguments:
        """The recipe's `TrainingArguments`.

        Args:
            model: the model to be trained.
            output_dir: as of `TrainingArguments`.
            **kwargs: any of its arguments; they take precedence.
        """
        defaults: dict[str, Any] = {
            "learning_rate": self.lr(model),
            "lr_scheduler_type": self.schedule,
            "lr_scheduler_kwargs": dict(self.schedule_arguments),
            "warmup_steps": self.warmup,  # a share of the steps, as it is below 1
            "weight_decay": 0.0,
        }
        if "lr_scheduler_type" in kwargs:  # whose arguments would be another's
            del defaults["lr_scheduler_kwargs"]
        return TrainingArguments(output_dir, **{**defaults, **kwargs})


RECIPE = Recipe()
