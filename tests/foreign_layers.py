"""A small model of any layer, and layers that other libraries have quantized, as far as this package looks at them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from conftest import VOCAB
from torch import nn


class Net(nn.Module):
    """Token ids -> embedding -> `first` -> `second` -> logits, with whatever layer a test wants for `second`."""

    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 32)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32) if second is None else second

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        logits = self.second(torch.tanh(self.first(self.embedding(input_ids))))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten() % logits.shape[-1])
        return SimpleNamespace(logits=logits, loss=loss)


class Int8Params(nn.Parameter):
    """As bitsandbytes': int8 data and its statistics."""

    def __new__(cls, data: torch.Tensor) -> Int8Params:
        parameter = torch.Tensor._make_subclass(cls, data, False)
        parameter.SCB = torch.ones(data.shape[0])
        return parameter


class Params4bit(nn.Parameter):
    """As bitsandbytes': two codes a byte, packed to [n, 1], in the bytes of `quant_storage`."""

    def __new__(cls, codes: torch.Tensor, quant_storage: torch.dtype) -> Params4bit:
        parameter = torch.Tensor._make_subclass(cls, codes.view(quant_storage).view(-1, 1), False)
        parameter.quant_state = SimpleNamespace(shape=(32, 32))
        return parameter


class Linear8bitLt(nn.Linear):
    """As bitsandbytes': an `nn.Linear` whose weight is int8."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.weight = Int8Params(torch.ones(32, 32, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) / 127, self.bias)


class Linear4bit(nn.Linear):
    """As bitsandbytes': an `nn.Linear` whose weight is packed."""

    def __init__(self, quant_storage: torch.dtype) -> None:
        super().__init__(32, 32)
        self.weight = Params4bit(torch.zeros(512, dtype=torch.uint8), quant_storage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.view(torch.uint8).float().mean() + self.bias


class Packed(nn.Module):
    """As the layers of GPTQ and AWQ (`qweight`) and of HQQ (`W_q`): no `weight`."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = self.out_features = 32
        self.packed = name
        setattr(self, name, nn.Parameter(torch.ones(4, 32, dtype=dtype), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * getattr(self, self.packed).float().mean()


class AffineQuantizedTensor(torch.Tensor):
    """As torchao's tensors: claims float32 and [32, 32], holds int8 and a scale."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> AffineQuantizedTensor:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("detach", "clone", "alias"):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        plain = [a.codes * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def torchao_linear() -> nn.Linear:
    """As after torchao's `quantize_`: a plain `nn.Linear` with a tensor subclass for its weight."""
    layer = nn.Linear(32, 32)
    weight = AffineQuantizedTensor(torch.ones(32, 32, dtype=torch.int8), torch.tensor(0.01))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes 8-bit": Linear8bitLt,
    "bitsandbytes 4-bit": lambda: Linear4bit(torch.uint8),
    "bitsandbytes 4-bit, quant_storage=bfloat16": lambda: Linear4bit(torch.bfloat16),
    "GPTQ or AWQ": lambda: Packed("qweight", torch.int32),
    "HQQ": lambda: Packed("W_q", torch.uint8),
    "torchao": torchao_linear,
}
