"""What all ways of calibrating share: a layer's trainable grid, its optimiser, its limits, and its freezing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from ..layer import DLQATLayer
from ..placement import several_processes
from ..quant.fit import snap
from .recipe import RECIPE


def grid_tensors(layer: DLQATLayer, adapter_name: str) -> list[torch.Tensor]:
    """s and, where there is one, z or b."""
    return [tensor for tensor in layer.scales_and_zeros(adapter_name) if tensor is not None]


def grid_optimizer(layers: Iterable[DLQATLayer], adapter_name: str, lr: float) -> torch.optim.Optimizer:
    """Adam, whose step is about its learning rate whatever the gradient, in each tensor's own unit.

    That is why LSQ's gradient scale is not needed here: a constant factor on a tensor's gradient changes no step.
    """
    groups = []
    for layer in layers:
        scale = layer.dlqat_scale[adapter_name]
        unit = scale.abs().mean().item()
        for tensor in grid_tensors(layer, adapter_name):
            in_codes = tensor is not scale and layer.specs[adapter_name].grid.zero_point == "integer"
            groups.append({"params": [tensor], "lr": lr if in_codes else lr * unit})
    return torch.optim.Adam(groups, eps=1e-15)  # a group's share of a mean loss can be far below the usual eps


@torch.no_grad()
def stay_on_grid(layers: Iterable[DLQATLayer], adapter_name: str) -> None:
    """Keep a scale from reaching zero and a zero point among the codes."""
    for layer in layers:
        grid, scale = layer.specs[adapter_name].grid, layer.dlqat_scale[adapter_name]
        smallest = grid.smallest_scale
        if grid.zero_point == "none":
            scale.copy_(torch.where(scale.abs() < smallest, smallest * torch.where(scale < 0, -1, 1), scale))
        else:
            scale.clamp_(min=smallest)
        if grid.zero_point == "integer":
            layer.dlqat_zero_point[adapter_name].clamp_(grid.qmin, grid.qmax)


@torch.no_grad()
def freeze(layers: Iterable[DLQATLayer], adapter_name: str) -> None:
    """Round scales and zeros to the values that ship."""
    for layer in layers:
        shipped = snap(*layer.scales_and_zeros(adapter_name), layer.specs[adapter_name].grid)
        set_grid(layer, adapter_name, shipped)


@torch.no_grad()
def set_grid(layer: DLQATLayer, adapter_name: str, values: Iterable[torch.Tensor | None]) -> None:
    """Write s and, where there is one, the zero into the layer's buffers."""
    for buffer, value in zip(layer.scales_and_zeros(adapter_name), values, strict=True):
        if buffer is not None and value is not None:
            buffer.copy_(value)


# A stage of a calibration: its loss, and the values of the tensors that it fits.
Stage = tuple[float, list[torch.Tensor]]


def values_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies."""
    return [tensor.detach().clone() for tensor in tensors]


def put_values(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Write values into tensors, whether they take gradients or not."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)


def lowest(stages: Iterable[Stage]) -> list[torch.Tensor]:
    """The values of the stage with the lowest loss; a loss that is no number is never the lowest."""
    return min(stages, key=lambda stage: stage[0] if math.isfinite(stage[0]) else math.inf)[1]


def check_steps(steps: int, lr: float, prefix: str = "") -> None:
    """Refuse what no calibration could do; `prefix` begins the names of the arguments.

    Raises:
        ValueError: unless steps is a non-negative integer and lr a positive number.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(
            f"{prefix}steps={steps!r} must be a non-negative integer; 0 only fits the grid to the inputs."
        )
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < math.inf:
        raise ValueError(f"{prefix}lr={lr!r} must be a positive number; the default is {RECIPE.calibration_lr:g}.")


def check_active(layers: Iterable[DLQATLayer], adapter_name: str) -> None:
    """Refuse an adapter that a forward pass would not go through, so that its grid would get no gradient.

    Raises:
        ValueError: if it is merged, not the active one, or switched off; or if W0 is packed on its grid.
    """
    for layer in layers:
        if layer.frozen.packed:
            raise ValueError(
                f"the frozen weights are packed on the grid of adapter {adapter_name!r}, which cannot move any more; "
                "load the base model again to calibrate anew."
            )
        if layer.merged:
            raise ValueError(
                f"adapter {adapter_name!r} is merged into the base model, where its grid cannot move; call "
                "unmerge_adapter() first."
            )
        if layer.active_adapters != [adapter_name] or layer.disable_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} must be the active one and switched on; call "
                f"set_adapter({adapter_name!r}) first, outside of disable_adapter()."
            )


def smallest_over_processes(count: int, device: torch.device) -> int:
    """The smallest of a number that each process has."""
    if several_processes():
        tensor = torch.tensor(count, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)
    return count


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """In place; the tensor itself where there is one process."""
    if several_processes():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def check_finite(loss: float, step: int, steps: int, lr: float) -> None:
    """Raise FloatingPointError for a loss that is no number; `step` counts from 1, and 0 is before the first."""
    if not math.isfinite(loss):
        when = f"at calibration step {step} of {steps}" if step else "before calibration"
        remedy = f"Lower lr={lr}, or check the batch" if step else "Check the data and the base model"
        raise FloatingPointError(f"the loss is {loss} {when}; the grid was put back. {remedy}.")


@contextmanager
def only_grid_trains(model: nn.Module, grid: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Inside the block only the given buffers take gradients; an exception puts their values back.

    Yields:
        Copies of their values at the start.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flags = [tensor.requires_grad for tensor in grid]
    initial = values_of(grid)
    for parameter in trained:
        parameter.requires_grad_(False)
    for tensor in grid:
        tensor.requires_grad_(True)
    try:
        yield initial
    except BaseException:
        put_values(grid, initial)
        raise
    finally:
        for tensor, flag in zip(grid, flags, strict=True):
            tensor.requires_grad_(flag)
            tensor.grad = None
        for parameter in trained:
            parameter.requires_grad_(True)
