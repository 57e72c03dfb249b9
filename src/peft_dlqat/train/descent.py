"""The one loop of calibration: gradient steps on scales and zeros down any loss, and the choice of the best result.

The loss is a whole model's (DL-QAT, arXiv 2504.09223, sec. 3.2), or one decoder layer's (EfficientQAT, arXiv
2407.11062, sec. 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist

from ..layer import DLQATLayer
from ..placement import several_processes
from .recipe import RECIPE
from .scales_and_zeros import (
    keep_in_range,
    put_values,
    round_as_shipped,
    scales_and_zeros,
    values_of,
)

# The three values that scales and zeros have in a calibration: initial, fitted to the inputs, after the steps.
Stage = Literal["before", "fitted", "after"]

# Called as log(step, loss, lr) after each step, which counts from 1.
Log = Callable[[int, float, float], None]


class Loss(Protocol):
    """What a calibration lowers."""

    def mean(self) -> float:
        """Over the batches on which stages are compared and over all processes, without dropout."""

    def at_step(self, step: int) -> torch.Tensor:
        """Of one optimiser step's data (steps count from 0), a scalar with a gradient.

        Under torch.distributed its mean over the processes is the loss of all processes' data.
        """


class Outcome(NamedTuple):
    """What a calibration did to one loss.

    Attributes:
        before: the loss of the initial scales and zeros.
        fitted: the same when they are fitted to the inputs; None where they were not.
        after: the same of those that were kept.
        kept: the stage of lowest loss.
    """

    before: float
    fitted: float | None
    after: float
    kept: Stage


def keep_lowest(
    loss: Loss, tensors: list[torch.Tensor], fit: Callable[[], None] | None, descend: Callable[[], None] | None
) -> Outcome:
    """Fit tensors, then descend from the better of the two, and keep the values of lowest loss.

    Args:
        loss: what is compared; one that is no number is never the lowest.
        tensors: what `fit` and `descend` move.
        fit: fits scales and zeros to the inputs; None to leave that out.
        descend: takes gradient steps; None to leave them out.

    Raises:
        FloatingPointError: if the loss is no finite number at the start.
    """
    losses: dict[Stage, float] = {"before": loss.mean()}
    values = {"before": values_of(tensors)}
    check_finite(losses["before"], "before calibration", "Check the data and the base model")

    def lowest() -> Stage:
        return min(losses, key=lambda stage: losses[stage] if math.isfinite(losses[stage]) else math.inf)

    stages: tuple[tuple[Stage, Callable[[], None] | None], ...] = (("fitted", fit), ("after", descend))
    for stage, move in stages:
        if move is not None:
            put_values(tensors, values[lowest()])
            move()
            losses[stage], values[stage] = loss.mean(), values_of(tensors)
    kept = lowest()
    put_values(tensors, values[kept])
    return Outcome(losses["before"], losses.get("fitted"), losses[kept], kept)


@dataclass(frozen=True)
class Descent:
    """How scales and zeros go down a loss.

    Attributes:
        adapter_name: whose.
        steps: optimiser steps.
        lr: learning rate at the start, falling linearly to 0, in each tensor's own unit.
        train_adapter: whether A, B, m and the shift go along.

    Raises:
        ValueError: unless steps is a non-negative integer and lr a positive number.
    """

    adapter_name: str
    steps: int
    lr: float
    train_adapter: bool = False

    def __post_init__(self) -> None:
        check_steps(self.steps, self.lr)

    def tensors(self, layers: Collection[DLQATLayer]) -> list[torch.Tensor]:
        """All that moves."""
        name = self.adapter_name
        return [
            tensor
            for layer in layers
            for tensor in (
                *scales_and_zeros(layer, name),
                *(parameter for _, parameter in layer.trained(name).values() if self.train_adapter),
            )
        ]

    def run(self, loss: Loss, layers: Collection[DLQATLayer], log: Log | None = None) -> None:
        """Take the steps, then round scales and zeros as they ship.

        Args:
            loss: what to lower.
            layers: whose tensors move; they take gradients already.
            log: called after each step.

        Raises:
            FloatingPointError: if the loss turns NaN or infinite.
        """
        tensors, optimizer = self.tensors(layers), self._optimizer(layers)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        for step in range(self.steps):
            of_step = loss.at_step(step)
            value = mean_over_processes(of_step.detach().clone()).item()
            check_finite(
                value, f"at calibration step {step + 1} of {self.steps}", f"Lower lr={self.lr}, or check the batch"
            )
            optimizer.zero_grad()
            of_step.backward()
            for tensor in tensors:
                tensor.grad = mean_over_processes(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
            optimizer.step()
            keep_in_range(layers, self.adapter_name)
            if log is not None:
                log(step + 1, value, self.lr * (1 - step / self.steps))
            schedule.step()
        round_as_shipped(layers, self.adapter_name)

    def _optimizer(self, layers: Collection[DLQATLayer]) -> torch.optim.Optimizer:
        """Adam, whose step is about its learning rate whatever the gradient, in each tensor's own unit.

        That is why LSQ's gradient scale is not needed here: a constant factor on a tensor's gradient changes no step.
        """
        groups = [
            {"params": [tensor], "lr": self.lr * unit}
            for units in (_units_of_scales, *((_units_of_trained,) if self.train_adapter else ()))
            for layer in layers
            for tensor, unit in units(layer, self.adapter_name).items()
        ]
        return torch.optim.Adam(groups, eps=1e-15)  # a group's share of a mean loss can be far below the usual eps


def _units_of_scales(layer: DLQATLayer, adapter_name: str) -> dict[torch.Tensor, float]:
    """Of s and b the layer's mean scale, of z one code."""
    scale = layer.dlqat_scale[adapter_name]
    unit, integer = scale.abs().mean().item(), layer.specs[adapter_name].grid.zero_point == "integer"
    return {
        tensor: 1.0 if tensor is not scale and integer else unit for tensor in scales_and_zeros(layer, adapter_name)
    }


def _units_of_trained(layer: DLQATLayer, adapter_name: str) -> dict[torch.Tensor, float]:
    """Of the method's own tensors, as it says."""
    tensors = layer.tensors(adapter_name)
    return {
        parameter: tensor.block_step(tensors) if callable(tensor.block_step) else tensor.block_step / tensor.unit
        for tensor, parameter in layer.trained(adapter_name).values()
    }


def check_steps(steps: int, lr: float, prefix: str = "") -> None:
    """Raises a ValueError for what no calibration could do; `prefix` begins the names of the arguments."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"{prefix}steps={steps!r} must be a non-negative integer; 0 only fits to the layers' inputs.")
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < math.inf:
        raise ValueError(f"{prefix}lr={lr!r} must be a positive number; the default is {RECIPE.calibration_lr:g}.")


def check_finite(loss: float, when: str, remedy: str) -> None:
    """Raises a FloatingPointError for a loss that is no finite number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} {when}; scales and zeros were put back. {remedy}.")


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """In place; the tensor itself where there is one process."""
    if several_processes():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def smallest_over_processes(count: int, device: torch.device) -> int:
    """The smallest of a number that each process has."""
    if several_processes():
        tensor = torch.tensor(count, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)
    return count
