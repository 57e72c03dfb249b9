"""Round-to-nearest: what quantization costs when nothing is done about it.

    w_hat = S * clip(round((w - M) / S), 0, 2**bits - 1) + M

S and M span each group's range ("minmax") or the clipped range of least squared rounding error ("mse"), as an
untrained DL-QAT adapter does. Needs no data. Library: peft_dlqat's own `initialise`.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .common import Batches, Config, check_levels, fit, grid_of, linear_layers, round_to


@torch.no_grad()
def quantize(
    model: PreTrainedModel, config: Config, batches: Batches | None = None, init: str = "mse"
) -> PreTrainedModel:
    """Round every weight; `init` is "mse" or "minmax", `batches` are not looked at."""
    for layer in linear_layers(model).values():
        grid = grid_of(config, layer)
        layer.weight.copy_(round_to(layer.weight, *fit(layer.weight, grid, init), grid))
    return check_levels(model, config)
