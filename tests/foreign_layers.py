"""A small model of any layer, and layers that other libraries have quantized, as far as this package looks at them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conftest import VOCAB
from torch import nn


class Net(nn.Module):
    """Token ids -> embedding -> `first` -> `second` -> logits, with whatever layer a test wants for `second`."""

    def __init__(self, second=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 32)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32) if second is None else second

    def forward(self, input_ids, labels=None):
        logits = self.second(torch.tanh(self.first(self.embedding(input_ids))))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten() % logits.shape[-1])
        return SimpleNamespace(logits=logits, loss=loss)


class AffineQuantizedTensor(torch.Tensor):
    """As torchao's, which claim the dtype and the shape of the weight."""


def linear(weight, **attributes):
    """An `nn.Linear` with such a weight, which has such attributes; it runs as if it were not there."""
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    vars(layer.weight).update(attributes)
    layer.forward = lambda x: x
    return layer


def without_weight(name, dtype):
    """A layer that keeps its codes under another name than `weight`."""
    layer = nn.Identity()
    layer.in_features = layer.out_features = 32
    layer.register_buffer(name, torch.ones(4, 32, dtype=dtype))
    return layer


QUANTIZED = {
    "bitsandbytes 8-bit": lambda: linear(torch.ones(32, 32, dtype=torch.int8), SCB=torch.ones(32)),
    # Two codes a byte, in the bytes of quant_storage.
    "bitsandbytes 4-bit": lambda: linear(torch.zeros(512, 1, dtype=torch.uint8), quant_state="nf4"),
    "bitsandbytes 4-bit in bfloat16": lambda: linear(torch.zeros(256, 1, dtype=torch.bfloat16), quant_state="nf4"),
    "GPTQ or AWQ": lambda: without_weight("qweight", torch.int32),
    "HQQ": lambda: without_weight("W_q", torch.uint8),
    "torchao": lambda: linear(torch.ones(32, 32).as_subclass(AffineQuantizedTensor)),
}
