"""What the peers share: which layers are quantized, and the affine grid they land on.

    w_hat = S * u + M,    u an integer in [0, 2**bits - 1];    S and M are [out, n_groups]

Every kind of `Grid` is of this form: M is qmin * S without a zero point, (qmin - z) * S with an integer one, and any
real number on a "float" grid.

Two kinds of peers, where `config` is anything with the `bits`, `group_size` and `zero_point` of a `DLQATConfig`:

- post-training: `quantize(model, config, batches) -> model`. `batches` is a list of {"input_ids": int64 [n, length]};
- trained: `prepare(model, config) -> Prepared`. The caller trains, so that every method has the same data and loss.

Both take the model over and change it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_dlqat.config import DEFAULT_GROUP_SIZE
from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.grid import SCALE_DTYPES, Grid, ZeroPoint, fitting_group

Batches = list[dict[str, torch.Tensor]]

# Scales and offsets of every peer ship in this type, or one as wide, where the setting says nothing else.
SCALE_DTYPE = torch.bfloat16


class Config(Protocol):
    """What is read of a `DLQATConfig`: the grid and, by peers with LoRA, the rank and alpha."""

    bits: int
    group_size: int
    zero_point: ZeroPoint
    r: int
    lora_alpha: float


@dataclass
class Prepared:
    """A model to be trained.

    Attributes:
        model: call it as any causal language model; what it computes is what the method trains.
        parameters: optimiser groups, {"params": list, "lr_factor": float}; the factor multiplies the learning rate.
        finish: gives a low-bit model with dequantized weights; leaves `model` as it is, so that it can train on.
        unmerged: for LoRA outside the quantizer, a model that keeps the adapter in 16 bits beside low-bit weights.
    """

    model: nn.Module
    parameters: list[dict[str, Any]]
    finish: Callable[[], PreTrainedModel]
    unmerged: Callable[[], nn.Module] | None = None


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every `nn.Linear` but the output head, by module name, in the order of the decoder layers.

    Raises:
        ValueError: for a model without any, as GPT-2 is, whose layers are transformers' own `Conv1D`.
    """
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.Linear beside its head, and the peers quantize no other kind of "
            "layer; compare them on a model with linear layers, such as LLaMA or OPT."
        )
    for name, layer in linear.items():
        layer.module_name = name  # by which a group_size_pattern knows it
    return linear


def with_divisors(model: PreTrainedModel, setting: dict[str, Any]) -> dict[str, Any]:
    """A setting whose group is the largest divisor where it does not divide a layer's inputs.

    So the runs of the stored results were made. `DLQATConfig` takes 64, 32 or the row there.
    """
    asked, head, own = setting.get("group_size", DEFAULT_GROUP_SIZE), model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if asked != -1 and isinstance(module, nn.Linear | Conv1D) and module is not head:
            inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            divisor = next(size for size in range(min(asked, inputs), 0, -1) if inputs % size == 0)
            own |= {name: divisor} if divisor != asked else {}
    return {**setting, "group_size_pattern": {**setting.get("group_size_pattern", {}), **own}}


def grid_of(config: Config, layer: nn.Linear) -> Grid:
    """The grid of a layer, as in `DLQATConfig`."""
    return grid_for(config, layer.module_name, layer.in_features)


def grid_for(config: Config, name: str, in_features: int) -> Grid:
    """The same for a layer that is known by its module name and inputs."""

    def of_module(field: str) -> int:
        pattern = getattr(config, f"{field}_pattern", {})
        return pattern.get(get_pattern_key(pattern.keys(), name), getattr(config, field))

    scales = getattr(config, "scale_dtype", None)
    scale_dtype = SCALE_DTYPES[scales] if scales else SCALE_DTYPE
    group_size = fitting_group(in_features, of_module("group_size"))
    return Grid(of_module("bits"), group_size, config.zero_point, scale_dtype, scales == "k_quant")


def fit(weight: torch.Tensor, grid: Grid, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """S and M [out, n_groups] of a weight [out, in]; `init` is "minmax" or "mse"."""
    scale, zero = initialise(weight, grid, init)
    if zero is None:
        return scale, grid.qmin * scale
    if grid.zero_point == "integer":
        return scale, (grid.qmin - zero) * scale
    return scale, grid.round_offset(zero + grid.qmin * scale)


def round_to(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The nearest point of the grid, w_hat [out, in]."""
    scale, offset = scale.unsqueeze(-1), offset.unsqueeze(-1)
    codes = ((grid.group(weight) - offset) / scale).round().clamp(0, 2**grid.bits - 1)
    return (scale * codes + offset).flatten(-2)


def straight_through(rounding: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`rounding(x)`, with the gradient of x."""
    return x + (rounding(x) - x).detach()


def check_levels(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """The model itself, once every group of every weight is seen to lie on `2**bits` evenly spaced levels.

    Only the weights are looked at, not how a method says it made them: some step must divide a group's range into at
    most `2**bits - 1` parts so that all of its weights are multiples of it away from the smallest.

    Raises:
        ValueError: naming the first layer that lies on no such grid.
    """
    for name, layer in linear_layers(model).items():
        grid = grid_of(config, layer)
        above = grid.group(layer.weight.detach().double())
        noise = 4 * torch.finfo(torch.float32).eps * above.abs().amax(-1)
        above = above - above.amin(-1, keepdim=True)
        span = above.amax(-1)
        fits = span <= noise
        for parts in range(1, 2**grid.bits):
            step = (span / parts).clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)
            away = ((above / step).round() * step - above).abs().amax(-1)
            fits |= away <= noise
        if not fits.all():
            raise ValueError(
                f"{name}.weight has {int((~fits).sum())} of {fits.numel()} groups off every grid of {2**grid.bits} "
                f"levels; quantize it with bits={grid.bits} and group_size={grid.group_size}."
            )
    return model
