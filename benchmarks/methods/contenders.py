"""Who takes part: the package's methods, and the peers, by the names that experiments use."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from peers.common import Batches, Prepared
from peft import get_peft_model
from tables import FULL_PRECISION
from transformers import PreTrainedModel

from peft_dlqat import DLQATConfig, calibrate, create_dlqat_optimizer

# What each is beside the setting's grid and rank.
METHODS: dict[str, dict[str, Any]] = {
    "dlqat": {},
    "dlqat-searched": {},
    "dlqat-no-magnitude": {"magnitude": False},
    "lrqat": {"method": "lrqat"},
    "l4q": {"method": "l4q"},
    "peqa": {"method": "peqa"},
    "qalora": {"method": "qalora"},
}
# Module and what to call it with.
POST_TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    FULL_PRECISION: ("full_precision", {}),
    "rtn-minmax": ("rtn", {"method": "minmax"}),
    "rtn-mse": ("rtn", {"method": "mse"}),
    "gptq": ("gptq", {}),
    "autoround": ("autoround", {"steps": 200}),
}
TRAINED_PEERS = {"lsq": "lsq", "torchao-qat-lora": "torchao_qat_lora", "lora-rtn": "lora_rtn", "loftq": "loftq"}
# LoRA in full precision has nothing to learn from its own teacher, so it learns the text.
NEXT_TOKEN = {"lora-rtn"}


# Trained as the default recipe says, learning rate and all; the others have theirs searched.
BY_RECIPE = {"dlqat"}


# Whose zeros are integers whatever is asked for.
INTEGER_ZEROS = {"autoround"}


def own_grid(name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """The setting with the kind of zero that the contender stores: its own width in the table."""
    integer = name in INTEGER_ZEROS and setting.get("zero_point") == "float"
    return {**setting, "zero_point": "integer"} if integer else setting


def is_trained(name: str) -> bool:
    """Whether the contender trains on the runner's batches."""
    return name in METHODS or name in TRAINED_PEERS


def quantize(
    name: str, model: PreTrainedModel, setting: dict[str, Any], batches: Batches, most_steps: int | None = None
) -> PreTrainedModel:
    """The low-bit model of a post-training contender; with no more than `most_steps` steps, if it takes any."""
    module, kwargs = POST_TRAINING[name]
    if most_steps is not None and "steps" in kwargs:
        kwargs = {**kwargs, "steps": min(most_steps, kwargs["steps"])}
    quantizer: Callable[..., PreTrainedModel] = importlib.import_module(f"peers.{module}").quantize
    return quantizer(model, DLQATConfig(**setting), batches, **kwargs)


def prepare(name: str, model: PreTrainedModel, setting: dict[str, Any], calibration: Batches, steps: int) -> Prepared:
    """A contender that is to be trained.

    Args:
        name: one of `METHODS` or `TRAINED_PEERS`.
        model: taken over.
        setting: arguments of `DLQATConfig`.
        calibration: batches to calibrate a method of the package on.
        steps: how many optimiser steps of these; 0 only fits the grid to the inputs.
    """
    if name in TRAINED_PEERS:
        return importlib.import_module(f"peers.{TRAINED_PEERS[name]}").prepare(model, DLQATConfig(**setting))
    adapted = get_peft_model(model, DLQATConfig(**{**setting, **METHODS[name]}, task_type="CAUSAL_LM"))
    calibrate(adapted, calibration, steps=steps, progress=False)
    optimizer = create_dlqat_optimizer(adapted, torch.optim.AdamW, lr=1.0)

    return Prepared(
        adapted,
        [{"params": group["params"], "lr_factor": group["lr"]} for group in optimizer.param_groups],
        lambda: copy.deepcopy(adapted).merge_and_unload(safe_merge=True),
    )
