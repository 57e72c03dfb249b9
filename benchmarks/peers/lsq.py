"""Quantization-aware training of every weight (LSQ, arXiv 1902.08153; offsets as LSQ+, arXiv 2004.09576): the ceiling.

    w_hat = S * u + M,    u = clip(round((W - M) / S), 0, 2**bits - 1)        W, S and M all trained

Rounding is straight-through and clipping has its true gradient, so that S gets LSQ's gradient (eq. 3) and M gets
LSQ+'s; both times LSQ's 1 / sqrt(n * (2**bits - 1)) for a group of n weights (section 2.2), which matters to SGD and
not to Adam. S and M start where an untrained DL-QAT adapter is and train in relative units, so that one learning rate
suits every layer:

    S = S0 * exp(log_step),    M = M0 + S0 * shift        (M0 * S / S0 on a grid without offsets: its zero stays)

Both are rounded to bfloat16 as they ship, straight-through. Library: none, but `torch.nn.utils.parametrize`.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from peft_dlqat.quant.grid import Grid

from .common import Config, Prepared, check_levels, fit, grid_of, linear_layers, straight_through

# Beside a learning rate of 3e-3, as LoRA trains with: of 0.1, 0.3 and 1 the best on a small LLaMA.
WEIGHT_LR_FACTOR = 0.3


class FakeQuantize(nn.Module):
    """A parametrization of `nn.Linear.weight` [out, in] with a grid that trains along."""

    def __init__(self, weight: torch.Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        scale, offset = fit(weight.detach(), grid, "mse")
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.log_step = nn.Parameter(torch.zeros_like(scale))
        self.shift = nn.Parameter(torch.zeros_like(scale), requires_grad=grid.zero_point == "float")
        share = 1 / math.sqrt(grid.group_size * (2**grid.bits - 1))
        for parameter in self.grid_parameters():
            parameter.register_hook(lambda gradient: gradient * share)

    def grid_parameters(self) -> list[nn.Parameter]:
        """What trains beside W."""
        return [parameter for parameter in (self.log_step, self.shift) if parameter.requires_grad]

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """w_hat [out, in]."""
        scale = straight_through(self.grid.round_scale, self.scale * self.log_step.exp())
        if self.grid.zero_point == "float":
            offset = straight_through(self.grid.round_offset, self.offset + self.scale * self.shift)
        else:
            offset = self.offset / self.scale * scale
        scale, offset = scale.unsqueeze(-1), offset.unsqueeze(-1)
        codes = straight_through(torch.round, (self.grid.group(weight) - offset) / scale)
        return (scale * codes.clamp(0, 2**self.grid.bits - 1) + offset).flatten(-2)


def plain(layer: nn.Linear) -> nn.Linear:
    """A linear layer with the parametrized weight of another, and its bias.

    Not `remove_parametrizations`: a copied layer shares its class with the original, which would lose its own.
    """
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    linear.bias = layer.bias
    return linear


def prepare(model: PreTrainedModel, config: Config) -> Prepared:
    """Every linear layer but the head computes with a fake-quantized weight; all else is frozen."""
    model.requires_grad_(False)
    weights, grids = [], []
    for layer in linear_layers(model).values():
        layer.weight.requires_grad_(True)
        quantizer = FakeQuantize(layer.weight, grid_of(config, layer))
        parametrize.register_parametrization(layer, "weight", quantizer)
        weights.append(layer.parametrizations.weight.original)
        grids += quantizer.grid_parameters()

    def finish() -> PreTrainedModel:
        final = copy.deepcopy(model)
        for name, layer in linear_layers(final).items():
            final.set_submodule(name, plain(layer))
        return check_levels(final.eval(), config)

    groups = [{"params": weights, "lr_factor": WEIGHT_LR_FACTOR}, {"params": grids, "lr_factor": 1.0}]
    return Prepared(model, groups, finish)
