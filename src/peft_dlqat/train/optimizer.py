"""An optimiser with DL-QAT's parameter groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from ..layer import DLQATLayer
from .recipe import RECIPE

# What the Trainer exempts from weight decay; m and shift are added to it below.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def scales_the_grid(parameter_name: str) -> bool:
    """Whether a parameter moves scales and zeros, as m and shift do: it must not decay."""
    return ".dlqat_magnitude." in parameter_name or ".dlqat_shift." in parameter_name


def create_dlqat_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float | None = None,
    magnitude_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Create an optimiser in which the magnitude m has a learning rate of its own and no weight decay.

    Decay would pull m to zero, and the layer's output with it. A shift of the zero goes with m. In the manner of
    PEFT's `create_loraplus_optimizer`.

    Args:
        model: a model with a DL-QAT adapter.
        optimizer_cls: for example `torch.optim.AdamW`.
        lr: learning rate of A, B and whatever else is trainable; the recipe's for the model's width by default.
        magnitude_lr: learning rate of m; the recipe's multiple of `lr` by default, and the method's share of that.
        weight_decay: of all but m, biases and norms.
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
    if magnitude_lr is None:
        magnitude_base, factors = lr, _magnitude_factors(model)
    else:
        magnitude_base, factors = magnitude_lr, dict.fromkeys(trainable.values(), 1.0)
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    magnitudes: dict[float, list[nn.Parameter]] = {}
    others: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in trainable.items():
        if scales_the_grid(name):
            magnitudes.setdefault(factors[parameter], []).append(parameter)
        else:
            (others if name in decayed else exempt).append(parameter)
    groups = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": exempt, "lr": lr, "weight_decay": 0.0},
        *(
            {"params": group, "lr": factor * magnitude_base, "weight_decay": 0.0}
            for factor, group in magnitudes.items()
        ),
    ]
    # Schedules that end at a rate of their own read the optimiser's own as the one to start from.
    return optimizer_cls([group for group in groups if group["params"]], **{**kwargs, "lr": lr})


def _magnitude_factors(model: nn.Module) -> dict[nn.Parameter, float]:
    """Of each m and shift, its learning rate over that of A and B."""
    return {
        tensors[name]: RECIPE.magnitude_factor * method.magnitude_share
        for layer in model.modules()
        if isinstance(layer, DLQATLayer)
        for name, method in layer.dlqat_method.items()
        for tensors in (layer.dlqat_magnitude, layer.dlqat_shift)
        if name in tensors
    }
