"""An optimiser with DL-QAT's parameter groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from ..layer import DLQATLayer
from ..methods import TrainedTensor
from .recipe import RECIPE

# What the Trainer exempts from weight decay.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def described_parameters(model: nn.Module) -> dict[nn.Parameter, TrainedTensor]:
    """Every adapter's trained parameters, each with what must be known of it."""
    return {
        parameter: tensor
        for layer in model.modules()
        if isinstance(layer, DLQATLayer)
        for name in layer.specs
        for tensor, parameter in layer.trained(name).values()
    }


def create_dlqat_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float | None = None,
    magnitude_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Create an optimiser in which each trained tensor has its own learning rate and weight decay.

    The magnitude m (and a shift of the zero) learns at a multiple of the rate of A and B, and does not decay: decay
    would pull m to zero, and the layer's output with it. A method says so of its tensors (see [`TrainedTensor`]). In
    the manner of PEFT's `create_loraplus_optimizer`.

    Args:
        model: a model with a DL-QAT adapter.
        optimizer_cls: for example `torch.optim.AdamW`.
        lr: learning rate of A, B and whatever else is trainable; the recipe's for the model's width by default.
        magnitude_lr: learning rate of m, and of whatever else of an adapter does not decay: shift, and such tensors of
            a method of your own. By default `lr` times the factor that the method gives each.
        weight_decay: of all but these, biases and norms.
        **kwargs: further arguments of the optimiser.

    Returns:
        The optimiser, to be given to the Trainer as `optimizers=(optimizer, None)`.

    Raises:
        ValueError: if nothing is trainable, or a learning rate is negative or no finite number.

    Example:
        ```py
        >>> optimizer = create_dlqat_optimizer(model, torch.optim.AdamW, lr=1e-3, magnitude_lr=1e-4)
        >>> trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
        ```
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter; add an adapter, or load one with is_trainable=True.")
    for argument, rate in (("lr", lr), ("magnitude_lr", magnitude_lr)):
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"{argument}={rate!r} must be a number, 0 or more; the recipe has {RECIPE.lr(model):g}.")
    lr = RECIPE.lr(model) if lr is None else lr
    described = described_parameters(model)
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    # By role, in a fixed order: a resumed run must find the groups that it saved, whatever the rates.
    decays, exempt = ("decayed", 1.0), ("exempt", 1.0)
    groups: dict[tuple[str, float], list[nn.Parameter]] = {decays: [], exempt: []}
    for name, parameter in trainable.items():
        tensor = described.get(parameter)
        if tensor is None:
            role = decays if name in decayed else exempt
        else:
            role = ("decayed" if tensor.decays else "adapter", tensor.lr_factor)
        groups.setdefault(role, []).append(parameter)

    # Schedules that end at a rate of their own read the optimiser's own as the one to start from.
    return optimizer_cls(
        [
            {
                "params": group,
                "lr": magnitude_lr if role[0] == "adapter" and magnitude_lr is not None else lr * role[1],
                "weight_decay": weight_decay if role[0] == "decayed" else 0.0,
            }
            for role, group in groups.items()
            if group
        ],
        **{**kwargs, "lr": lr},
    )
