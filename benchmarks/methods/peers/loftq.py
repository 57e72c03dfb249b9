"""LoftQ (arXiv 2310.08659): LoRA outside the quantizer that starts at what rounding lost.

    Q = round(W0 - scaling * BA),    scaling * BA = best rank-r approximation of W0 - Q,    in turns (algorithm 1)
    y = x Q^T + scaling * x A^T B^T

Q is frozen then, A and B train. `finish` rounds Q + scaling * BA and `unmerged` keeps A and B in 16 bits beside Q.

Library: peft's `LoraConfig`, but not its `LoftQConfig`, which knows 2, 4 and 8 bits on NormalFloat levels, in blocks
of 64 weights: no grid of ours.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from peft_dlqat.quant.grid import Grid

from . import rtn
from .common import Config, Prepared, fit, grid_of, linear_layers, round_to
from .lora import add_lora, lora_group, merged, sixteen_bits

TURNS = 5  # as in the paper's experiments


@torch.no_grad()
def prepare(model: PreTrainedModel, config: Config) -> Prepared:
    """Quantize every linear layer but the head and start its LoRA at the rounding error."""
    names = list(linear_layers(model))
    adapted = add_lora(model, config)
    for name in names:
        layer = adapted.base_model.model.get_submodule(name)
        base, scaling = layer.base_layer, layer.scaling["default"]
        quantized, A, B = alternate(base.weight, grid_of(config, base), layer.r["default"])
        base.weight.copy_(quantized)
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B / scaling)

    def finish() -> PreTrainedModel:
        return rtn.quantize(merged(adapted).eval(), config)

    return Prepared(adapted, lora_group(adapted), finish, lambda: sixteen_bits(adapted))


def alternate(weight: torch.Tensor, grid: Grid, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q [out, in], A [r, in] and B [out, r] with Q + BA close to a weight [out, in]."""
    A, B = weight.new_zeros(r, weight.shape[1]), weight.new_zeros(weight.shape[0], r)
    for _ in range(TURNS):
        rest = weight - B @ A
        quantized = round_to(rest, *fit(rest, grid, "mse"), grid)
        U, S, V = torch.linalg.svd(weight - quantized, full_matrices=False)
        root = S[:r].sqrt()
        A, B = root[:, None] * V[:r], U[:, :r] * root
    return quantized, A, B
