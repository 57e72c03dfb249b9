"""The tensors of a layer that calibration moves: its scales and zeros, and on request what the adapter trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..layer import DLQATLayer
from ..quant.fit import snap


def scales_and_zeros(layer: DLQATLayer, adapter_name: str) -> list[torch.Tensor]:
    """s [out, n_groups] and, where there is one, z or b of the same shape."""
    return [tensor for tensor in layer.scales_and_zeros(adapter_name) if tensor is not None]


@torch.no_grad()
def set_scales_and_zeros(layer: DLQATLayer, adapter_name: str, values: Iterable[torch.Tensor | None]) -> None:
    """Write s and, where there is one, the zero into the layer's buffers."""
    for buffer, value in zip(layer.scales_and_zeros(adapter_name), values, strict=True):
        if buffer is not None and value is not None:
            buffer.copy_(value)


@torch.no_grad()
def keep_in_range(layers: Iterable[DLQATLayer], adapter_name: str) -> None:
    """Keep a scale from reaching zero and an integer zero among the codes."""
    for layer in layers:
        grid, scale = layer.specs[adapter_name].grid, layer.dlqat_scale[adapter_name]
        smallest = grid.smallest_scale
        if grid.zero_point == "none":
            scale.copy_(torch.where(scale.abs() < smallest, smallest * torch.where(scale < 0, -1, 1), scale))
        else:
            scale.clamp_(min=smallest)
        if grid.zero_point == "integer":
            layer.dlqat_zero_point[adapter_name].clamp_(grid.qmin, grid.qmax)


def round_as_shipped(layers: Iterable[DLQATLayer], adapter_name: str) -> None:
    """Round scales and zeros to the values that ship."""
    for layer in layers:
        shipped = snap(*layer.scales_and_zeros(adapter_name), layer.specs[adapter_name].grid)
        set_scales_and_zeros(layer, adapter_name, shipped)


def values_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies."""
    return [tensor.detach().clone() for tensor in tensors]


def put_values(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Write values into tensors, whether they take gradients or not."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)


@contextmanager
def only_these_train(model: nn.Module, tensors: list[torch.Tensor]) -> Iterator[None]:
    """Inside the block only the given tensors take gradients; an exception puts their values back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flags = [tensor.requires_grad for tensor in tensors]
    initial = values_of(tensors)
    for parameter in trained:
        parameter.requires_grad_(False)
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        yield
    except BaseException:
        put_values(tensors, initial)
        raise
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
            tensor.grad = None
        for parameter in trained:
            parameter.requires_grad_(True)


def check_movable(layers: Iterable[DLQATLayer], adapter_name: str) -> None:
    """Refuse an adapter that a forward pass would not go through, so that its scales would get no gradient.

    Raises:
        ValueError: if it is merged, not the active one, or switched off; or if W0 is packed by its scales.
    """
    for layer in layers:
        if layer.frozen.in_file is not None:
            raise ValueError(
                "the scales and zeros are the quantized file's own, and stay: there is nothing to calibrate; train "
                "the adapter."
            )
        if layer.frozen.packed:
            raise ValueError(
                f"the frozen weights are packed by the scales of adapter {adapter_name!r}, which cannot move any "
                "more; load the base model again to calibrate anew."
            )
        if layer.merged:
            raise ValueError(
                f"adapter {adapter_name!r} is merged into the base model, where its scales cannot move; call "
                "unmerge_adapter() first."
            )
        if layer.active_adapters != [adapter_name] or layer.disable_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} must be the active one and switched on; call "
                f"set_adapter({adapter_name!r}) first, outside of disable_adapter()."
            )
