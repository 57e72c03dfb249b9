"""Calibration by gradient through the whole model (DL-QAT, arXiv 2504.09223, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..layer import DLQATLayer
from .calibration_losses import Objective, batch_loss
from .grid_training import check_finite, freeze, grid_optimizer, grid_tensors, mean_over_processes, stay_on_grid


def fit_by_gradient(
    model: nn.Module,
    layers: Collection[DLQATLayer],
    batches: Iterable[dict[str, Any]],
    steps: int,
    lr: float,
    objective: Objective,
    adapter_name: str,
    progress: bool,
    log: Callable[[int, dict[str, float]], None] | None,
) -> None:
    """Move the layers' s and zero, which take gradients already, along the model's loss; then round them for good.

    Raises:
        FloatingPointError: if the loss turns NaN or infinite.
    """
    optimizer = grid_optimizer(layers, adapter_name, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    bar = tqdm(zip(range(steps), batches, strict=False), total=steps, desc="calibrating", disable=not progress)
    for step, batch in bar:
        loss = batch_loss(model, batch, objective)
        value = mean_over_processes(loss.detach().clone()).item()
        check_finite(value, step + 1, steps, lr)
        optimizer.zero_grad()
        loss.backward()
        for layer in layers:
            for tensor in grid_tensors(layer, adapter_name):
                tensor.grad = mean_over_processes(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        optimizer.step()
        stay_on_grid(layers, adapter_name)
        bar.set_postfix(loss=f"{value:.4f}")
        if log is not None:
            log(step + 1, {"calibration/loss": value, "calibration/lr": lr * (1 - step / steps)})
        schedule.step()
    freeze(layers, adapter_name)
