"""The default recipe: one object with the numbers that a user gets who sets only `bits`."""

from __future__ import annotations

import math
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
    rate of A and B, and the magnitude's not above theirs (`examples/arguments.py`). With fewer tokens a step the
    gradient is noisier, and the rate falls as the square root, as is known of Adam (arXiv 2205.10287) and was seen at
    a quarter of them. For wide models it falls with the width, which is a guess: at LLaMA-7B's it is 9e-4, near the
    1e-3 (same unit) of LR-QAT's published runs.

    Attributes:
        calibration_steps: gradient steps on s and the zero, after the fit to the layers' inputs. At small budgets each
            is better spent on training.
        calibration_lr: their learning rate.
        block_steps: those on each decoder layer where it goes by blocks, with the same learning rate.
        learning_rate: of A and B, the latter in units of the step, for models of up to `reference_width` hidden units
            and steps of at least `reference_tokens`.
        reference_width: beyond it, the learning rate falls as 1 / width.
        reference_tokens: below so many tokens a step, the learning rate falls as sqrt(tokens).
        warmup: share of the steps in which the learning rate rises.
        schedule: transformers' name of what it does then: it falls to 0 as the square of the steps left, and gives the
            codes time to settle.
        schedule_arguments: arguments of the schedule.
    """

    calibration_steps: int = 0
    calibration_lr: float = 3e-2
    block_steps: int = 200
    learning_rate: float = 1.4e-2
    reference_width: int = 256
    reference_tokens: int = 16 * 256
    warmup: float = 0.025
    schedule: str = "polynomial"
    schedule_arguments: tuple[tuple[str, float], ...] = (("power", 2.0), ("lr_end", 0.0))

    def lr(self, model: nn.Module, tokens_per_step: int | None = None) -> float:
        """Learning rate of A and B for a model.

        Args:
            model: its hidden size counts; one without is taken for narrow.
            tokens_per_step: that an optimiser step sees, over all sequences, accumulated batches and processes;
                `reference_tokens` by default.

        Raises:
            ValueError: if `tokens_per_step` is not positive.
        """
        if isinstance(tokens_per_step, bool) or (tokens_per_step is not None and not 0 < tokens_per_step < math.inf):
            raise ValueError(
                f"tokens_per_step={tokens_per_step}: must be positive, sequences of a step times their length."
            )
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(config, "hidden_size", None) or self.reference_width
        tokens = min(tokens_per_step or self.reference_tokens, self.reference_tokens)
        return self.learning_rate * min(1.0, self.reference_width / width) * (tokens / self.reference_tokens) ** 0.5

    def training_arguments(
        self, model: nn.Module, output_dir: str, tokens_per_step: int | None = None, **kwargs: Any
    ) -> TrainingArguments:
        """The recipe's `TrainingArguments`.

        Their learning rate is for `create_dlqat_optimizer(..., lr=arguments.learning_rate)`: an optimiser that is
        passed to a Trainer has its own.

        Args:
            model: the model to be trained.
            output_dir: as of `TrainingArguments`.
            tokens_per_step: as of `lr`.
            **kwargs: any of its arguments; they take precedence.

        Raises:
            ValueError: as of `lr`.
        """
        defaults: dict[str, Any] = {
            "learning_rate": self.lr(model, tokens_per_step),
            "lr_scheduler_type": self.schedule,
            "lr_scheduler_kwargs": dict(self.schedule_arguments),
            "warmup_steps": self.warmup,  # a share of the steps, as it is below 1
            "weight_decay": 0.0,
        }
        if "lr_scheduler_type" in kwargs:  # whose arguments would be another's
            del defaults["lr_scheduler_kwargs"]
        return TrainingArguments(output_dir, **{**defaults, **kwargs})


RECIPE = Recipe()
