"""State of an adapter that stays float32 when a model is cast to another dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn


class _Float32Mixin:
    """A dict of tensors that follows a module's device but stays float32.

    Rounded to bf16 or fp16 they would be other numbers, and the weight another weight.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)  # type: ignore[misc]


class Float32ParameterDict(_Float32Mixin, nn.ParameterDict):
    """An `nn.ParameterDict` whose entries stay float32."""


class Float32BufferDict(_Float32Mixin, BufferDict):
    """PEFT's `BufferDict`, persistent, whose entries stay float32."""

    def __init__(self) -> None:
        super().__init__(persistent=True)
