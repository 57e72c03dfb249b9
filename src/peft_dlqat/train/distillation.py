"""The base model as its own teacher: the same weights with the adapters switched off."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..running import adapters_disabled, base_model, evaluating, forward, is_encoder_decoder, unwrapped
from .divergence import TopTokens, confidence, token_divergence

Reverse = float | Literal["confidence"]


@torch.no_grad()
def teacher_logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of the base model in full precision, without dropout.

    Args:
        model: a model with adapters, merged or not; it is left as it was.
        batch: keyword arguments of its forward; `labels` are left out.

    Returns:
        Logits, [batch, length, vocabulary] for a language model.

    Raises:
        ValueError: for an encoder-decoder, whose decoder takes its inputs from the labels, a head for regression or
            for several labels at once, or a model without logits.
    """
    check_classes(model)
    if is_encoder_decoder(model):
        raise ValueError("an encoder-decoder cannot be run without labels; use objective='task' for it.")
    with evaluating(model), adapters_disabled(model):
        output = forward(model, {key: value for key, value in batch.items() if key != "labels"})
    if getattr(output, "logits", None) is None:
        raise ValueError(f"the model returns a {type(output).__name__} without logits; use objective='task' for it.")
    return output.logits


def check_classes(model: nn.Module) -> None:
    """Raises a ValueError if the model's head gives no distribution over classes, which the divergence compares."""
    base = base_model(unwrapped(model))
    config = getattr(base, "config", None)
    problem, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    of_classes = labels != 1 and problem not in ("regression", "multi_label_classification")
    if type(base).__name__.endswith("Classification") and not of_classes:
        raise ValueError(
            f"a {type(base).__name__} with num_labels={labels} and problem_type={problem!r} gives no distribution "
            "over classes, and so there is no divergence between two; use objective='task', or train without "
            "compute_loss_func."
        )


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
