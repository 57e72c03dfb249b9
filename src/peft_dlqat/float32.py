"""State of an adapter that stays float32 when a model is cast to another dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn


class _Float32Mixin:
    """A module whose own tensors follow the model's device but stay float32.

    Rounded to bf16 or fp16 they would be other numbers, and the weight another weight.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)  # type: ignore[misc]


class _Entry(_Float32Mixin, nn.Module):
    """One adapter's tensor. What was made to take no gradient stays so, whoever puts another in its place."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self._frozen = not weight.requires_grad
        self.weight = weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; transformers' loading of an adapter assigns Parameters that all take gradients."""
        if param is not None and self._frozen:
            param.requires_grad_(False)
        super().register_parameter(name, param)


class Float32ParameterDict(nn.ModuleDict):
    """One Parameter an adapter, which stays float32: `parameters[adapter_name]`.

    In the model its name is `NAME.ADAPTER.weight`, as that of LoRA's are: TRL and others find an adapter's parameters
    by ".ADAPTER." in their names. As PEFT expects of a ModuleDict, `items()` and `values()` are modules.
    """

    def __getitem__(self, adapter_name: str) -> nn.Parameter:  # type: ignore[override]
        """The adapter's Parameter."""
        parameter = self.get(adapter_name)
        if parameter is None:
            raise KeyError(adapter_name)
        return parameter

    def get(self, adapter_name: str) -> nn.Parameter | None:
        """The adapter's Parameter, or None where it has none."""
        entry = self._modules.get(adapter_name)
        if entry is None:
            return None
        # Past nn.Module's own lookup. DataParallel's replicas have it as an attribute only.
        parameter = entry._parameters.get("weight")
        return entry.weight if parameter is None else parameter  # type: ignore[return-value]

    def __setitem__(self, adapter_name: str, parameter: nn.Parameter) -> None:  # type: ignore[override]
        """Add an adapter's, or put another in its place."""
        super().__setitem__(adapter_name, _Entry(parameter))


class Float32BufferDict(_Float32Mixin, BufferDict):
    """PEFT's `BufferDict`, persistent, whose entries stay float32."""

    def __init__(self) -> None:
        super().__init__(persistent=True)

    def get(self, adapter_name: str) -> torch.Tensor | None:
        """The adapter's buffer, or None where it has none."""
        return self[adapter_name] if adapter_name in self else None  # noqa: SIM401  this is it
