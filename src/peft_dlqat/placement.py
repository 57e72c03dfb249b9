"""Base weights that something else has taken away: accelerate's offload, DeepSpeed's ZeRO-3, FSDP2.

A DL-QAT layer reads the base layer's weight and never calls the base layer, on whose call their hooks wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
import torch.distributed as dist
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether a device_map keeps the module's own tensors on the CPU or disk, and they are not here now."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return has_offloaded_params(module) and any(tensor.is_meta for tensor in tensors)


def device_of(module: nn.Module) -> torch.device:
    """Where a model computes: the device of its first tensor that is not offloaded, and so on the meta device."""
    devices = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 spreads the parameter over processes."""
    return hasattr(parameter, "ds_shape")


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 spreads a parameter over processes, so that all of them have to run it together."""
    return any(is_partitioned(parameter) or isinstance(parameter, _dtensor()) for parameter in module.parameters())


def several_processes() -> bool:
    """Whether others take part, under torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_any_process(condition: bool, device: torch.device) -> bool:
    """Whether it holds in this process or in another; all must ask."""
    if not several_processes():
        return condition
    tensor = torch.tensor(int(condition), device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor)


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The parameter's shape when all of it is here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def check_here(layer: nn.Module, action: str) -> None:
    """Refuse to replace a weight that is elsewhere: what is written here would be lost.

    Raises:
        ValueError: if it is offloaded, or partitioned by ZeRO-3.
    """
    partitioned = any(is_partitioned(parameter) for parameter in layer.parameters())
    if is_offloaded(layer) or partitioned:
        where = "partitioned by DeepSpeed ZeRO-3" if partitioned else "offloaded to the CPU or disk by a device_map"
        raise ValueError(
            f"cannot {action} a {type(layer).__name__} whose weight is {where}; use storage='full', or load_packed(), "
            "and merge the saved adapter into a base model that is loaded whole."
        )


def loaded(module: nn.Module) -> AbstractContextManager[None]:
    """Inside the block a module's own tensors are here where a device_map keeps them elsewhere."""
    return align_module_device(module) if is_offloaded(module) else nullcontext()


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Inside the block all tensors of a module are here and whole, to be read.

    Raises:
        ValueError: if FSDP2 shards one, outside of the forward pass of the unit that it belongs to.
    """
    with ExitStack() as stack:
        for part in module.modules():
            if is_offloaded(part):  # torch.compile cannot trace a null context in the stack
                stack.enter_context(align_module_device(part))
        partitioned = [parameter for parameter in module.parameters() if _lacks(parameter)]
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        for parameter in module.parameters():
            check_whole(parameter)
        yield


def check_whole(parameter: torch.Tensor) -> None:
    """Raises a ValueError if FSDP2 shards the parameter."""
    if isinstance(parameter, _dtensor()):
        raise ValueError(
            f"a weight {list(parameter.shape)} is sharded by FSDP2, so that this process has only a part of it; "
            "calibrate, pack, merge, export, or make a DistillationLoss (and fill its cache, where biases train) "
            "before the model is sharded, or load the saved adapter into a whole one."
        )


def gather_with(module: nn.Module) -> None:
    """Gather what ZeRO-3 has partitioned below a module, and have it do so from now on when the module is called."""
    for parameter in module.parameters():
        if _lacks(parameter):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)
            parameter.all_gather()  # type: ignore[attr-defined]


def _lacks(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has not gathered the parameter."""
    return is_partitioned(parameter) and tuple(parameter.shape) != full_shape(parameter)


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor
