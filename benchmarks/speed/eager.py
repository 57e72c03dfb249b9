"""Other ways to train a low-bit layer, each as its paper or recipe says, in plain torch.

All have the grid of `bits` and `group_size` with an integer zero, found by min-max. The weight is made in float32 and
multiplied in the dtype of x.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.grid import Grid, fitting_group


def straight_through(rounded: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The value of `rounded`, the gradient of `real`."""
    return real + (rounded - real).detach()


class _Quantized(nn.Module):
    def __init__(self, weight: torch.Tensor, bits: int, group_size: int, r: int) -> None:
        super().__init__()
        weight = weight.detach()
        self.grid = Grid(bits, fitting_group(weight.shape[1], group_size), "integer", torch.bfloat16)
        s, z = initialise(weight, self.grid, "minmax")
        self.s = nn.Parameter(s.unsqueeze(-1))
        self.register_buffer("z", z.unsqueeze(-1))
        self.register_buffer("weight", weight)
        self.A = nn.Parameter(torch.empty(r, weight.shape[1], device=weight.device))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], r, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def fake_quantize(self, units: torch.Tensor) -> torch.Tensor:
        """w_hat from the weight in units of the grid [out, n_groups, group_size]."""
        clipped = units.clamp(self.grid.qmin, self.grid.qmax)
        return (self.s * (straight_through(clipped.round(), clipped) - self.z)).flatten(1)


def replace_layers(model: nn.Module, kind: type[nn.Module], bits: int, group_size: int, r: int) -> nn.Module:
    """Put a peer in the place of every linear layer but the head; nothing else trains."""
    model.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not path.endswith("lm_head"):
            model.set_submodule(path, kind(layer.weight, bits, group_size, r))
    return model


class CheckpointedLRQAT(_Quantized):
    """LR-QAT (arXiv 2406.06385): the weight in int8 fixed point, the update in grid units, the layer checkpointed."""

    def __init__(self, weight: torch.Tensor, bits: int, group_size: int, r: int) -> None:
        super().__init__(weight, bits, group_size, r)
        self.fraction = 2 ** (8 - bits)
        units = self.grid.group(self.weight) / self.s.detach() + self.z
        self.weight = (units * self.fraction).round().clamp(-128, 127).to(torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weight is made again in backward, so that nothing of its size is kept."""
        return checkpoint(self._forward, x, use_reentrant=False)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        w_hat = self.fake_quantize(self.weight / self.fraction + self.grid.group(self.B @ self.A))
        return F.linear(x, w_hat.to(x.dtype))


class FakeQuantizedWithLoRA(_Quantized):
    """Quantization-aware training with LoRA outside the quantizer, as torchao's and torchtune's: x Q(W0)' + x A'B'."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weight is fake-quantized in every forward pass."""
        w_hat = self.fake_quantize(self.grid.group(self.weight) / self.s.detach() + self.z)
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return F.linear(x, w_hat.detach().to(x.dtype)) + x @ A.t() @ B.t()


class FullWeightQAT(_Quantized):
    """LSQ (arXiv 1902.08153): every weight trains, and its step."""

    def __init__(self, weight: torch.Tensor, bits: int, group_size: int, r: int) -> None:
        super().__init__(weight, bits, group_size, r)
        del self.A, self.B
        self.weight = nn.Parameter(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All by autograd."""
        return F.linear(x, self.fake_quantize(self.grid.group(self.weight) / self.s + self.z).to(x.dtype))


PEERS: dict[str, type[nn.Module]] = {
    "LR-QAT, checkpointed, eager": CheckpointedLRQAT,
    "fake-quantized weight + LoRA, eager": FakeQuantizedWithLoRA,
    "QAT of the full weight, eager": FullWeightQAT,
}
