"""The whole model's loss, which calibration lowers: a mean over all processes' tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..placement import device_of, in_any_process
from ..running import evaluating, forward, is_encoder_decoder, logits_of, predicts_next, teacher_logits, to_device
from .descent import mean_over_processes, smallest_over_processes
from .distillation import counted_positions, distillation_loss

ModelObjective = Literal["distill", "logits", "task"]


class ModelLoss:
    """A model's loss on the batches of a loader, as `descent.Loss` has it.

    Attributes:
        measured: the first batches, on which the mean is taken.
        training: the batches of the steps, the first ones included.

    Args:
        model: a model with adapters.
        objective: "distill" for the KL divergence to the model with its adapters disabled, "logits" for the mean
            squared difference of the logits to that model's, "task" for the loss that the model returns.
        dataloader: batches, each a dict of the model's keyword arguments; each process has its own.
        measured: how many batches to measure on, at most: as many in each process as the one with the fewest has.
        steps: steps that need a batch each, for which the loader is started again when it ends; 0 to read it once.

    Raises:
        ValueError: if the loader is empty, or in its first batches nothing counts.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: ModelObjective,
        dataloader: Iterable[Mapping[str, Any]],
        measured: int,
        steps: int,
    ) -> None:
        device = device_of(model)
        batches = _batches(dataloader, steps, device)
        first = list(itertools.islice(batches, measured))
        self.measured = first[: smallest_over_processes(len(first), device)]
        self.training: Iterator[dict[str, Any]] = itertools.chain(self.measured, batches)
        self._model, self._objective = model, objective
        self._check_counted(device)

    @torch.no_grad()
    def mean(self) -> float:
        """Mean over the measured batches and all processes, without dropout."""
        with evaluating(self._model):
            losses = [batch_loss(self._model, batch, self._objective) for batch in self.measured]
        return mean_over_processes(torch.stack(losses).mean()).item()

    def at_step(self, step: int) -> torch.Tensor:
        """Of the next batch, a scalar."""
        return batch_loss(self._model, next(self.training), self._objective)

    def _check_counted(self, device: torch.device) -> None:
        """Refuse batches in which nothing counts: their loss is 0 whatever the scales."""
        counts = [_counts(self._model, batch) for batch in self.measured]
        if not in_any_process(any(own is None or bool(own.any()) for own in counts), device):
            raise ValueError(
                f"no position of the first {len(counts)} calibration batches counts: all labels are -100, or all of "
                "the attention mask is 0; check how the batches are made."
            )


def batch_loss(model: nn.Module, batch: dict[str, Any], objective: ModelObjective) -> torch.Tensor:
    """Mean loss of a batch, a scalar, weighted by the batch's share in all processes' tokens."""
    return _share(model, batch) * _own_loss(model, batch, objective)


def _batches(dataloader: Iterable[Mapping[str, Any]], steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches on the model's device: for ever, or once through where there are no steps that need them."""
    count = 0
    while True:
        before = count
        iterator = iter(dataloader)
        for batch in iterator:
            count += 1
            yield to_device(batch, device)
        if count == 0:
            raise ValueError("the calibration loader is empty; it must give at least one batch.")
        if not steps:
            return
        if count == before or iterator is dataloader:
            raise ValueError(
                f"the calibration loader ended after {count} batches, cannot be started again, and {steps} steps need "
                f"more; pass a DataLoader or a list, or steps={count}."
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
    of_tokens = labels is None or ids is None or labels.shape == ids.shape or is_encoder_decoder(model)
    return counted_positions(labels if of_tokens else None, padding_mask(model, batch), predicts_next(model))


def padding_mask(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor | None:
    """The mask that says what of the output is padding, [batch, length]; one of who attends to whom does not."""
    mask = batch.get("decoder_attention_mask" if is_encoder_decoder(model) else "attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _own_loss(model: nn.Module, batch: dict[str, Any], objective: ModelObjective) -> torch.Tensor:
    """Mean loss of this process's batch, a scalar."""
    if objective != "task":
        teacher, logits = teacher_logits(model, batch), logits_of(model, batch)
        if objective == "logits":
            error, counts = (logits.float() - teacher.float()).square().mean(-1), _counts(model, batch)
            return error[counts].mean() if counts is not None and counts.shape == error.shape else error.mean()
        labels, mask = batch.get("labels"), padding_mask(model, batch)
        return distillation_loss(logits, teacher, labels, mask, next_token=predicts_next(model))
    loss = forward(model, batch).loss
    if loss is None:
        raise ValueError("the model returned no loss for objective='task'; give the batches labels, or use 'distill'.")
    return loss
