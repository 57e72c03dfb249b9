"""Distillation while training, in a Trainer as it is: an object for its `compute_loss_func`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layer import adapter_layers
from ..running import is_encoder_decoder, predicts_next, trained_base_parameters, unwrapped
from .distillation import (
    Reverse,
    check_classes,
    check_reverse,
    counted_positions,
    distillation_loss,
    mean_over,
    targets,
    teacher_logits,
)
from .divergence import TopTokens, cross_entropy
from .teacher_cache import TeacherCache


class DistillationLoss:
    """The loss of a `Trainer` or `SFTTrainer` that trains towards the full-precision model's own predictions.

    The teacher is the model itself with its adapters switched off. A Trainer does not tell its `compute_loss_func`
    what the batch was, so this object looks at what the model is called with, by a hook that `remove()` takes away.

    For causal and masked language models and classifiers of sequences or tokens into one of several classes, wrapped
    by PEFT or injected. Batches of an optimiser step (gradient accumulation) and processes count by their tokens, as
    in one big batch.

    Args:
        model: the model that the Trainer trains, with its DL-QAT adapter.
        reverse: weight of the reverse divergence, or "confidence", see [`distillation_loss`]; the confidence is
            measured on each batch that the model is called with.
        task_weight: loss = divergence + task_weight * cross-entropy with the labels.
        cache: keeps the teacher's predictions, so that its pass is paid once for each sequence. Where parameters of
            the base model train in place (`DLQATConfig(bias=...)`), the teacher would drift with them: fill the cache
            before training.

    Raises:
        ValueError: for an impossible argument, an encoder-decoder, a head for regression or for several labels at
            once, a model whose adapter is missing or merged, or one of whose base parameters train without a cache;
            or if the cache is another model's.

    Example:
        ```py
        >>> trainer = Trainer(model, args, train_dataset=data, compute_loss_func=DistillationLoss(model))
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reverse: Reverse = 0.0,
        task_weight: float = 0.0,
        cache: TeacherCache | None = None,
    ) -> None:
        check_reverse(reverse)
        if (
            not isinstance(task_weight, float | int)
            or isinstance(task_weight, bool)
            or not 0 <= task_weight < torch.inf
        ):
            raise ValueError(
                f"task_weight={task_weight!r} must be a number, 0 or more; 0 trains on the teacher alone."
            )
        model = unwrapped(model)
        adapter_name, layers = adapter_layers(model)
        if any(layer.merged for layer in layers.values()):
            raise ValueError(f"adapter {adapter_name!r} is merged and does not train; call unmerge_adapter() first.")
        if is_encoder_decoder(model):
            raise ValueError(
                "an encoder-decoder cannot be distilled: its decoder takes its inputs from the labels. Train it on "
                "the task's loss, without compute_loss_func."
            )
        drifting = trained_base_parameters(model)
        if drifting and cache is None:
            raise ValueError(
                f"{len(drifting)} parameters of the base model train in place ({', '.join(drifting[:3])}...), and the "
                "teacher would drift with them; leave them frozen (DLQATConfig(bias='none')), or fill a cache before "
                "training, cache.teacher(model, batch) for each batch of the data, and pass it as cache=."
            )
        check_classes(model)
        if cache is not None:
            cache.claim(model)
        self.reverse: Reverse = reverse
        self.task_weight = task_weight
        self.cache = cache
        self._model = model
        self._next_token = predicts_next(model)
        self._batch: dict[str, Any] | None = None
        self._teaching = False
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()
        self._batch = None

    def __call__(
        self,
        outputs: Any,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of the batch that the model was last called with.

        Args:
            outputs: what the model returned.
            labels: [batch, length] as the model takes them, or [batch] for a classifier of sequences.
            num_items_in_batch: how many tokens (or sequences) the optimiser step has in all its batches; None for a
                mean over this batch.

        Returns:
            A scalar, in nats a token.

        Raises:
            ValueError: without labels or logits, with labels of another shape than theirs, or if the model was not
                called before.
        """
        batch, self._batch = self._batch, None
        logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
        if labels is None:
            raise ValueError(
                "the batch has no labels, which say what tokens count; use DataCollatorForLanguageModeling(tokenizer, "
                "mlm=False), or give the data a column of labels."
            )
        if logits is None:
            raise ValueError(
                f"the model returned a {type(outputs).__name__} without logits, which distilling compares; switch off "
                "what leaves them out, such as use_liger_kernel."
            )
        if batch is None:
            raise ValueError(
                "the model of this DistillationLoss was not called before the loss; make it with the very model that "
                "the Trainer trains (trainer.model), and don't call it after remove()."
            )
        teacher = self._teach(batch)
        _check_positions(logits, teacher)
        items, next_token = num_items_in_batch, self._next_token
        loss = distillation_loss(logits, teacher, labels, reverse=self.reverse, num_items=items, next_token=next_token)
        if self.task_weight:
            loss = loss + self.task_weight * _task_loss(logits, labels, items, next_token)
        return loss

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what the model is called with, except as its own teacher."""
        if not self._teaching:
            self._batch = kwargs

    def _teach(self, batch: dict[str, Any]) -> torch.Tensor | TopTokens:
        batch = {key: value for key, value in batch.items() if key not in ("labels", "num_items_in_batch")}
        self._teaching = True
        try:
            return teacher_logits(self._model, batch) if self.cache is None else self.cache.teacher(self._model, batch)
        finally:
            self._teaching = False


def _check_positions(logits: torch.Tensor, teacher: torch.Tensor | TopTokens) -> None:
    known = (teacher.ids if isinstance(teacher, TopTokens) else teacher).shape[:-1]
    if known != logits.shape[:-1]:
        raise ValueError(
            f"the logits' shape {list(logits.shape)} is not that of the batch that the model was last called with "
            f"({list(known)} positions); with several GPUs, start one process for each by torchrun."
        )


def _task_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None, next_token: bool
) -> torch.Tensor:
    """Cross-entropy with the labels, in nats a token that counts."""
    counts = counted_positions(labels, None, next_token)
    wanted = labels if counts is None else targets(labels, next_token)
    return mean_over(cross_entropy(logits, wanted), counts, num_items)
