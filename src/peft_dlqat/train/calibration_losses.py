"""The loss that calibration lowers, a mean over all processes' tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from ..placement import in_any_process
from ..running import evaluating, forward, is_encoder_decoder, predicts_next
from .distillation import counted_positions, distillation_loss, teacher_logits
from .grid_training import mean_over_processes

Objective = Literal["distill", "task"]
OBJECTIVES: tuple[Objective, ...] = ("distill", "task")


def batch_loss(model: nn.Module, batch: dict[str, Any], objective: Objective) -> torch.Tensor:
    """Mean loss of a batch, a scalar, weighted by the batch's share in all processes' tokens."""
    return _share(model, batch) * _own_loss(model, batch, objective)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[dict[str, Any]], objective: Objective) -> float:
    """Mean loss over batches and processes, without dropout."""
    with evaluating(model):
        mean = torch.stack([batch_loss(model, batch, objective) for batch in batches]).mean()
    return mean_over_processes(mean).item()


def check_counted(model: nn.Module, batches: list[dict[str, Any]], device: torch.device) -> None:
    """Refuse batches in which nothing counts: their loss is 0 whatever the grid.

    Raises:
        ValueError: if all labels are -100, or all of the attention mask is 0, in every process's batches.
    """
    counts = [_counts(model, batch) for batch in batches]
    if not in_any_process(any(own is None or bool(own.any()) for own in counts), device):
        raise ValueError(
            f"no position of the first {len(batches)} calibration batches counts: all labels are -100, or all of the "
            "attention mask is 0; check how the batches are made."
        )


def _share(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor | float:
    """This process's share of the tokens that count, times the number of processes: 1 where all have as many.

    A mean over processes of losses weighted so is the mean over all tokens, as in one process with all of them.
    """
    counts = _counts(model, batch)
    if counts is None:
        return 1.0
    own = counts.sum().float()
    return own / mean_over_processes(own.clone()).clamp(min=1)


def _counts(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor | None:
    """Which positions of a batch count, bool; None where nothing says so."""
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if labels is not None and is_encoder_decoder(model):
        return labels != -100  # which the decoder gets shifted
    if labels is not None and ids is not None and labels.shape != ids.shape:  # of sequences, not of tokens
        labels = None
    return counted_positions(labels, _mask(batch), predicts_next(model))


def _mask(batch: dict[str, Any]) -> torch.Tensor | None:
    """The mask that says what is padding, [batch, length]; one of who attends to whom does not."""
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _own_loss(model: nn.Module, batch: dict[str, Any], objective: Objective) -> torch.Tensor:
    """Mean loss of this process's batch, a scalar."""
    if objective == "distill":
        teacher = teacher_logits(model, batch)
        logits = forward(model, {key: value for key, value in batch.items() if key != "labels"}).logits
        return distillation_loss(logits, teacher, batch.get("labels"), _mask(batch), next_token=predicts_next(model))
    loss = forward(model, batch).loss
    if loss is None:
        raise ValueError("the model returned no loss for objective='task'; give the batches labels, or use 'distill'.")
    return loss
