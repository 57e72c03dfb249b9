"""GPTQ (arXiv 2210.17323): round one column after another, and let the columns to come make up for the error.

With H = E[x x^T] of a layer's inputs, damped, and U the upper Cholesky factor of its inverse (algorithm 1):

    for each input column c:    q = nearest level of w[:, c]
                                w[:, c+1:] -= (w[:, c] - q) / U[c, c] * U[c, c+1:]

Each decoder layer sees the inputs that the already quantized layers before it give. S and M of a group are fitted when
its first column is reached, to the weights as they are by then. The paper's lazy batches of 128 columns change only
the order of additions and are left out.

Library: none. Of the maintained ones, llmcompressor (0.14) requires transformers <= 5.21 and gptqmodel a CUDA build of
torch.
"""

from __future__ import annotations

import re
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_dlqat.quant.grid import Grid

from .common import Batches, Config, check_levels, fit, grid_of, linear_layers, round_to

DAMPING = 0.01  # the paper's 1% of the mean diagonal


@torch.no_grad()
def quantize(model: PreTrainedModel, config: Config, batches: Batches, init: str = "mse") -> PreTrainedModel:
    """Quantize decoder layer by decoder layer.

    Args:
        model: a causal language model.
        config: the grid.
        batches: calibration data.
        init: how a group's S and M are fitted, "minmax" (the paper's) or "mse".
    """
    model.eval()
    for _, members in groupby(linear_layers(model).items(), key=lambda item: decoder_layer(item[0])):
        layers = dict(members)
        moments = second_moments(model, layers, batches)
        for name, layer in layers.items():
            layer.weight.copy_(gptq(layer.weight, moments[name], grid_of(config, layer), init))
    return check_levels(model, config)


def decoder_layer(name: str) -> str:
    """A module's name up to its first index: "model.layers.3.mlp.up_proj" is in "model.layers.3"."""
    return re.sub(r"(\.\d+)\..*", r"\1", name)


def second_moments(model: PreTrainedModel, layers: dict[str, nn.Linear], batches: Batches) -> dict[str, torch.Tensor]:
    """E[x x^T] [in, in] of each layer's inputs over all tokens, float64."""
    totals = {name: torch.zeros(layer.in_features, layer.in_features).double() for name, layer in layers.items()}

    def add(name: str, inputs: torch.Tensor) -> None:
        x = inputs.flatten(0, -2).float()
        totals[name] += x.T @ x / len(x) / len(batches)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, layer in layers.items()
    ]
    for batch in batches:
        model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return totals


def gptq(weight: torch.Tensor, moment: torch.Tensor, grid: Grid, init: str) -> torch.Tensor:
    """w_hat [out, in] of a weight [out, in], given the second moment [in, in] of its inputs (algorithm 1)."""
    moment = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    weight, size = weight.clone(), grid.group_size
    for column in range(weight.shape[1]):
        if column % size == 0:
            scale, offset = fit(weight[:, column : column + size], grid, init)
        now = weight[:, column].clone()
        one = Grid(grid.bits, 1, grid.zero_point, grid.scale_dtype)
        weight[:, column] = round_to(now.unsqueeze(-1), scale, offset, one).squeeze(-1)
        error = (now - weight[:, column]) / upper[column, column]
        weight[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    return weight
