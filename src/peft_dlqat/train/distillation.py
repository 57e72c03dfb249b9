"""Distillation: the base model, the same weights with the adapters switched off, as teacher of the quantized one."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..layer import adapter_layers
from ..running import (
    base_model,
    evaluating,
    gives_distribution,
    is_encoder_decoder,
    logits_of,
    predicts_next,
    teacher_logits,
    trained_base_parameters,
    unwrapped,
)
from .divergence import TopTokens, confidence, cross_entropy, token_divergence
from .teacher_cache import TeacherCache

Reverse = float | Literal["confidence"]


def distillation_loss(
    logits: torch.Tensor,
    teacher: torch.Tensor | TopTokens,
    labels: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    reverse: Reverse = 0.0,
    num_items: torch.Tensor | int | None = None,
    next_token: bool = True,
) -> torch.Tensor:
    """Mean KL divergence, in nats a token, between the teacher's next-token distribution and the model's.

    (1 - reverse) * KL(teacher || model) + reverse * KL(model || teacher). The forward one, the default, is what
    LLM-QAT (arXiv 2305.17888) minimises; it wants the model to cover whatever the teacher may say. The reverse one
    wants it to say nothing that the teacher would not. "confidence" is BitDistiller's CAKLD (arXiv 2402.10631),
    whose weight of the reverse part is the teacher's mean confidence. As in its authors' code, that is the probability
    of the teacher's likeliest token; theirs is measured once on some batches of the data, this one on the
    positions given. To fix it, pass the number.

    Large vocabularies are worked through some tokens at a time, so that beside the two arguments there is no
    [batch, length, vocabulary] in float32.

    Args:
        logits: the model's, [batch, length, vocabulary].
        teacher: the teacher's, the same shape; or its likeliest tokens, which give the divergence on those and one
            bucket for all others, at most the full one.
        labels: [batch, length] as the model takes them; positions whose label, the next one's, is -100 don't count.
        mask: attention mask [batch, length], used where there are no labels: padding does not count.
        reverse: weight of the reverse divergence, from 0 to 1, or "confidence".
        num_items: what to divide the sum by, instead of the number of positions that count: the tokens of all the
            batches of an optimiser step, where this is one of several; 0 counts as 1.
        next_token: a position predicts the next one's label; False where it predicts its own, as in token classifiers
            and masked language models.

    Returns:
        A scalar, differentiable in `logits`; 0 where nothing counts.

    Raises:
        ValueError: for another `reverse`, or labels, a mask or a teacher of another shape.
    """
    check_reverse(reverse)
    if logits.dim() == 2:  # a classifier has one distribution a sequence, whatever the mask of its tokens
        counts = mask.bool() if mask is not None and mask.shape == logits.shape[:-1] else None
    else:
        for name, tensor in (("labels", labels), ("mask", mask)):
            if tensor is not None and tensor.shape != logits.shape[:-1]:
                raise ValueError(
                    f"{name} of shape {list(tensor.shape)} must have that of the logits' positions, "
                    f"{list(logits.shape[:-1])}."
                )
        counts = counted_positions(labels, mask, next_token)
    if isinstance(teacher, torch.Tensor) and teacher.shape != logits.shape:
        raise ValueError(
            f"the teacher's logits {list(teacher.shape)} must have the model's shape {list(logits.shape)}."
        )
    weight = mean_over(confidence(teacher), counts) if isinstance(reverse, str) else reverse
    return mean_over(token_divergence(logits, teacher, weight), counts, num_items)


def check_reverse(reverse: Reverse) -> None:
    """Raises a ValueError unless it is a number from 0 to 1, or "confidence"."""
    number = isinstance(reverse, float | int) and not isinstance(reverse, bool)
    if reverse != "confidence" and not (number and 0 <= reverse <= 1):  # type: ignore[operator]
        raise ValueError(
            f"reverse={reverse!r} must be a number from 0, KL(teacher || model), to 1, KL(model || teacher), or "
            "'confidence', which lets the teacher's confidence set it."
        )


def mean_over(
    values: torch.Tensor, counts: torch.Tensor | None, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean of values [...] over the positions that count (bool [...], None for all), or their sum / num_items."""
    if counts is None:
        counts = torch.ones_like(values, dtype=torch.bool)
    values = torch.where(counts, values, 0)  # not multiplied: at padding it may be NaN
    return values.sum() / (counts.sum() if num_items is None else torch.as_tensor(num_items)).clamp(min=1)


def targets(labels: torch.Tensor, next_token: bool = True) -> torch.Tensor:
    """What each position predicts, [batch, length]: the label of the next, or its own; -100 for nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=-100) if next_token else labels


def counted_positions(
    labels: torch.Tensor | None, mask: torch.Tensor | None, next_token: bool = True
) -> torch.Tensor | None:
    """Which positions of a batch count, bool [batch, length]: those whose label is not -100, or not padding.

    None where neither labels [batch, length] nor a mask say.
    """
    if labels is not None and labels.dim() == 2:
        return targets(labels, next_token) != -100
    return None if mask is None else mask.bool()


class DistillationLoss:
    """The loss of a `Trainer` or `SFTTrainer` that trains towards the full-precision model's own predictions.

    The teacher is the model itself with its adapters switched off, or another one. A Trainer does not tell its
    `compute_loss_func` what the batch was, so this object looks at what the model is called with, by a hook that
    `remove()` takes away.

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
        teacher: a better model of the same vocabulary, on the same device, in the place of the model itself: the
            16-bit original of a quantized file, say.

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
        teacher: nn.Module | None = None,
    ) -> None:
        check_reverse(reverse)
        if teacher is not None and cache is not None:
            raise ValueError("a cache keeps the predictions of the model's own base; leave out teacher= or cache=.")
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
        if drifting and cache is None and teacher is None:
            raise ValueError(
                f"{len(drifting)} parameters of the base model train in place ({', '.join(drifting[:3])}...), and the "
                "teacher would drift with them; leave them frozen (DLQATConfig(bias='none')), or fill a cache before "
                "training, cache.teacher(model, batch) for each batch of the data, and pass it as cache=."
            )
        if not gives_distribution(model):
            base = base_model(unwrapped(model))
            raise ValueError(
                f"a {type(base).__name__} with num_labels={base.config.num_labels} and "
                f"problem_type={base.config.problem_type!r} gives no distribution over classes, and so there is no "
                "divergence between two; train without compute_loss_func."
            )
        if cache is not None:
            cache.claim(model)
        self.reverse: Reverse = reverse
        self.task_weight = task_weight
        self.cache = cache
        self._teacher = teacher
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
        if self._teacher is not None:
            with torch.no_grad(), evaluating(self._teacher):
                return logits_of(self._teacher, batch)
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
