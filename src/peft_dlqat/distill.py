"""The base model as its own teacher: the same weights with the adapters switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the untouched base model inside the block, on any model with adapters, wrapped or injected.

    Unlike PEFT's `disable_adapter`, this leaves every parameter's `requires_grad` as it is.

    Args:
        model: a model with adapters.
    """
    switches = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [module._disable_adapters for module in switches]
    for module in switches:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, disabled in zip(switches, before, strict=True):
            module._disable_adapters = disabled


@torch.no_grad()
def teacher_logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of the base model in full precision, without dropout.

    Args:
        model: a model with adapters.
        batch: keyword arguments of its forward; `labels` are left out.

    Returns:
        Logits, [batch, length, vocabulary] for a language model.

    Raises:
        ValueError: for an encoder-decoder, whose decoder takes its inputs from the labels, or a model without logits.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("an encoder-decoder cannot be run without labels; use objective='task' for it.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with adapters_disabled(model):
            output = model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        for module, training in modes.items():
            module.training = training
    if getattr(output, "logits", None) is None:
        raise ValueError(f"the model returns a {type(output).__name__} without logits; use objective='task' for it.")
    return output.logits


def distillation_loss(
    logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean KL divergence, in nats a token, from the teacher's next-token distribution to the model's.

    KL(teacher || model), the objective that LLM-QAT (arXiv 2305.17888) and BitDistiller's forward half minimise.

    Args:
        logits: the model's, [batch, length, vocabulary].
        teacher: the teacher's, the same shape.
        labels: [batch, length] as a causal language model takes them; positions whose next label is -100 don't count.
        mask: attention mask [batch, length], used where there are no labels: padding does not count.

    Returns:
        A scalar, differentiable in `logits`; 0 where nothing counts.
    """
    log_p, log_q = teacher.float().log_softmax(-1), logits.float().log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    counts = counted_positions(labels, mask)
    if counts is None or counts.shape != divergence.shape:  # as for a classifier: one distribution a sequence
        return divergence.mean()
    return (divergence * counts).sum() / counts.sum().clamp(min=1)


def counted_positions(labels: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which positions of a batch count, bool [batch, length]: those whose next label is not -100, or not padding.

    None where neither labels [batch, length] nor a mask say.
    """
    if labels is not None and labels.dim() == 2:
        return F.pad(labels[:, 1:] != -100, (0, 1), value=False)
    return None if mask is None else mask.bool()
