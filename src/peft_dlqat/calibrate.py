"""Calibration: fit every layer's scale and zero by gradient, then freeze them (DL-QAT, arXiv 2504.09223, sec. 3.2)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from .distill import counted_positions, distillation_loss, teacher_logits
from .initialisation import snap
from .layer import DLQATLayer, adapter_layers

Objective = Literal["distill", "task"]
OBJECTIVES: tuple[Objective, ...] = ("distill", "task")

# Batches on which the gain is measured, before and after.
_MEASURED_BATCHES = 8


@dataclass(frozen=True)
class Calibration:
    """What a calibration did.

    Attributes:
        steps: optimiser steps.
        objective: "distill" or "task".
        loss_before: mean loss of the initial grid on the first batches of the loader.
        loss_after: the same on the frozen grid, scales and zero points rounded as they ship.
        kept: False if the loss did not fall, and the initial grid was put back.
    """

    steps: int
    objective: Objective
    loss_before: float
    loss_after: float
    kept: bool = True

    def __str__(self) -> str:
        """One line, with the figures."""
        loss = "KL to the full-precision model" if self.objective == "distill" else "loss"
        verdict = "" if self.kept else "; not lower, so the initial grid was put back"
        return f"calibrated in {self.steps} steps: {loss} {self.loss_before:.4f} -> {self.loss_after:.4f}{verdict}"


def calibrate(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    steps: int = 1000,
    lr: float = 3e-2,
    objective: Objective = "distill",
    adapter_name: str | None = None,
    progress: bool = True,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> Calibration:
    """Fit scale and zero of all layers by gradient through the straight-through quantizer, then freeze them.

    Only s and z (or b) move; A, B, m and the base model stay. With "distill" the loss is the KL divergence to the
    model with its adapters disabled: a teacher that costs a forward pass and no memory. With "task" it is the loss
    that the model returns. Under torch.distributed, gradients are averaged over the processes, each of which passes
    its own share of the data. The model runs in the mode (train or eval) it is in. Random number generators are left
    as they were. The result is kept in the adapter's config, and so in its model card.

    Args:
        model: a model with a DL-QAT adapter, from `get_peft_model` or transformers' `add_adapter`.
        dataloader: batches, each a dict of the model's keyword arguments; started again when it ends.
        steps: optimiser steps.
        lr: learning rate at the start, falling linearly to 0; a share of each layer's mean scale for s and b, and of
            one code for z.
        objective: "distill" or "task".
        adapter_name: the adapter to calibrate; defaults to the active one.
        progress: show a progress bar.
        log: called after each step as log(step, {"calibration/loss": ..., "calibration/lr": ...}).

    Returns:
        A [`Calibration`]: the loss before and after.

    Raises:
        ValueError: for an impossible argument, a model without the adapter, or a loader that is empty, or ends early
            and cannot be started again. The grid is then as it was before.
        FloatingPointError: if the loss turns NaN or infinite. The grid is then as it was before.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} must be one of {', '.join(map(repr, OBJECTIVES))}.")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a positive integer; 100 to 1000 are usual.")
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r} must be a positive number; the default is 3e-2.")
    adapter_name, layers = adapter_layers(model, adapter_name)
    record = model.peft_config[adapter_name].record  # type: ignore[union-attr,index,operator]
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            f"adapter {adapter_name!r} is merged into the base model, where its grid cannot move; call "
            "unmerge_adapter() first."
        )
    device = next(model.parameters()).device
    grid = [tensor for layer in layers.values() for tensor in _grid_tensors(layer, adapter_name)]

    with _random_state_kept(), _only_grid_trains(model, grid) as initial:
        batches = _cycle(dataloader, steps, device)
        measured = [next(batches) for _ in range(min(_MEASURED_BATCHES, steps))]
        loss_before = _measure(model, measured, objective)
        optimizer = _optimizer(layers.values(), adapter_name, lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        bar = tqdm(range(steps), desc="calibrating", disable=not progress)
        for step in bar:
            loss = _loss(model, measured[step] if step < len(measured) else next(batches), objective)
            value = _mean_over_processes(loss.detach()).item()
            _check_finite(value, step, steps, lr)
            optimizer.zero_grad()
            loss.backward()
            for tensor in grid:
                tensor.grad = _mean_over_processes(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
            optimizer.step()
            _stay_on_grid(layers.values(), adapter_name)
            bar.set_postfix(loss=f"{value:.4f}")
            if log is not None:
                log(step + 1, {"calibration/loss": value, "calibration/lr": lr * (1 - step / steps)})
            schedule.step()
        _freeze(layers.values(), adapter_name)
        loss_after = _measure(model, measured, objective)
        if kept := loss_after < loss_before:
            result = Calibration(steps, objective, loss_before, loss_after)
        else:
            for tensor, value_before in zip(grid, initial, strict=True):
                tensor.data.copy_(value_before)
            result = Calibration(steps, objective, loss_before, loss_before, kept)
    record["calibration"] = asdict(result)  # type: ignore[index,operator]
    return result


def _grid_tensors(layer: DLQATLayer, adapter_name: str) -> list[torch.Tensor]:
    """s and, where there is one, z or b."""
    zero = layer.zero(adapter_name)
    return [layer.dlqat_scale[adapter_name], *([] if zero is None else [zero])]


def _optimizer(layers: Iterable[DLQATLayer], adapter_name: str, lr: float) -> torch.optim.Optimizer:
    """Adam, whose step is about its learning rate whatever the gradient, in each tensor's own unit."""
    groups = []
    for layer in layers:
        scale = layer.dlqat_scale[adapter_name]
        unit = scale.abs().mean().item()
        for tensor in _grid_tensors(layer, adapter_name):
            in_codes = tensor is not scale and layer.dlqat_grid[adapter_name].zero_point == "integer"
            groups.append({"params": [tensor], "lr": lr if in_codes else lr * unit})
    return torch.optim.Adam(groups, eps=1e-15)  # a group's share of a mean loss can be far below the usual eps


@torch.no_grad()
def _stay_on_grid(layers: Iterable[DLQATLayer], adapter_name: str) -> None:
    """Keep a scale from reaching zero and a zero point among the codes."""
    for layer in layers:
        grid, scale = layer.dlqat_grid[adapter_name], layer.dlqat_scale[adapter_name]
        smallest = torch.finfo(grid.scale_dtype).smallest_normal
        if grid.zero_point == "none":
            scale.copy_(torch.where(scale.abs() < smallest, smallest * torch.where(scale < 0, -1, 1), scale))
        else:
            scale.clamp_(min=smallest)
        if grid.zero_point == "integer":
            layer.dlqat_zero_point[adapter_name].clamp_(grid.qmin, grid.qmax)


@torch.no_grad()
def _freeze(layers: Iterable[DLQATLayer], adapter_name: str) -> None:
    """Round scales and zeros to the values that ship."""
    for layer in layers:
        scale, zero = layer.dlqat_scale[adapter_name], layer.zero(adapter_name)
        shipped_scale, shipped_zero = snap(scale, zero, layer.dlqat_grid[adapter_name])
        scale.copy_(shipped_scale)
        if zero is not None and shipped_zero is not None:
            zero.copy_(shipped_zero)


def _share(batch: dict[str, Any]) -> torch.Tensor | float:
    """This process's share of the tokens that count, times the number of processes: 1 where all have as many.

    A mean over processes of losses weighted so is the mean over all tokens, as in one process with all of them.
    """
    counts = counted_positions(batch.get("labels"), batch.get("attention_mask"))
    if counts is None:
        return 1.0
    own = counts.sum().float()
    return own / _mean_over_processes(own.clone()).clamp(min=1)


def _loss(model: nn.Module, batch: dict[str, Any], objective: Objective) -> torch.Tensor:
    """Mean loss of a batch, a scalar, weighted by the batch's share in all processes' tokens."""
    return _share(batch) * _own_loss(model, batch, objective)


def _own_loss(model: nn.Module, batch: dict[str, Any], objective: Objective) -> torch.Tensor:
    """Mean loss of this process's batch, a scalar."""
    if objective == "distill":
        teacher = teacher_logits(model, batch)
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return distillation_loss(logits, teacher, batch.get("labels"), batch.get("attention_mask"))
    loss = model(**batch).loss
    if loss is None:
        raise ValueError("the model returned no loss for objective='task'; give the batches labels, or use 'distill'.")
    return loss


@torch.no_grad()
def _measure(model: nn.Module, batches: list[dict[str, Any]], objective: Objective) -> float:
    """Mean loss over batches and processes, without dropout."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        mean = torch.stack([_loss(model, batch, objective) for batch in batches]).mean()
    finally:
        for module, training in modes.items():
            module.training = training
    return _mean_over_processes(mean).item()


def _mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """In place; the tensor itself where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def _check_finite(loss: float, step: int, steps: int, lr: float) -> None:
    if not math.isfinite(loss):
        remedy = f"Lower lr={lr}, or check the batch" if step else "Check the data and the base model"
        raise FloatingPointError(
            f"the loss is {loss} at calibration step {step + 1} of {steps}; the grid was put back. {remedy}."
        )


def _cycle(dataloader: Iterable[Mapping[str, Any]], steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches on the model's device, for ever.

    Raises:
        ValueError: if the loader is empty, or ends before `steps` and cannot be started again.
    """
    count = 0
    while True:
        before = count
        iterator = iter(dataloader)
        for batch in iterator:
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"a calibration batch is a {type(batch).__name__}, but must be a dict of the model's arguments, "
                    "such as {'input_ids': ..., 'labels': ...}."
                )
            count += 1
            yield send_to_device(dict(batch), device)
        if count == 0:
            raise ValueError("the calibration loader is empty; it must give at least one batch.")
        if count == before or iterator is dataloader:
            raise ValueError(
                f"the calibration loader ended after {count} batches, cannot be started again, and {steps} steps need "
                f"more; pass a DataLoader or a list, or steps={count}."
            )


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Training after calibration draws the same random numbers as training without: a resumed run relies on it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _only_grid_trains(model: nn.Module, grid: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Inside the block only the given buffers take gradients; an exception puts their values back.

    Yields:
        Copies of their values at the start.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    initial = [tensor.detach().clone() for tensor in grid]
    for parameter in trained:
        parameter.requires_grad_(False)
    for tensor in grid:
        tensor.requires_grad_(True)
    try:
        yield initial
    except BaseException:
        for tensor, value in zip(grid, initial, strict=True):
            tensor.data.copy_(value)
        raise
    finally:
        for tensor in grid:
            tensor.requires_grad_(False)
            tensor.grad = None
        for parameter in trained:
            parameter.requires_grad_(True)
