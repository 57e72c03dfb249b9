"""Who takes part in the methods comparison, by the names that experiments use: the package's methods, and peers/."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from peers.common import Batches, Prepared, with_divisors
from peft import get_peft_model
from runs import BY_RECIPE
from transformers import PreTrainedModel

from peft_dlqat import DLQATConfig, calibrate, create_dlqat_optimizer

# What each is beside the setting's grid and rank.
OURS: dict[str, dict[str, Any]] = {
    BY_RECIPE: {},
    "dlqat-searched": {},
    "dlqat-no-magnitude": {"magnitude": False},
    "lrqat": {"method": "lrqat"},
    "l4q": {"method": "l4q"},
    "peqa": {"method": "peqa"},
    "qalora": {"method": "qalora"},
}
# The module in peers/ and what to call it with.
TRAINED = {"lsq": "lsq", "torchao-qat-lora": "torchao_qat_lora", "lora-rtn": "lora"}
ROUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn-minmax": ("rtn", {"init": "minmax"}),
    "rtn-mse": ("rtn", {"init": "mse"}),
    "gptq": ("gptq", {}),
    "autoround": ("autoround", {"steps": 200}),
}
FULL_PRECISION = "full-precision"  # the model as it is
INTEGER_ZEROS = {"autoround"}  # whatever zeros are asked for
# LoRA in full precision has nothing to learn from its own teacher, so it learns the text.
NEXT_TOKEN = {"lora-rtn"}


def is_trained(name: str) -> bool:
    """Whether the contender trains on the runner's batches."""
    return name in OURS or name in TRAINED


def own_grid(name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """The setting with the kind of zero that the contender stores."""
    integer = name in INTEGER_ZEROS and setting.get("zero_point") == "float"
    return {**setting, "zero_point": "integer"} if integer else setting


def quantize(
    name: str, model: PreTrainedModel, setting: dict[str, Any], batches: Batches, most_steps: int | None = None
) -> PreTrainedModel:
    """The low-bit model of a contender that does not train; `most_steps` bounds its steps, if it takes any."""
    if name == FULL_PRECISION:
        return model
    setting = with_divisors(model, setting)
    module, kwargs = ROUNDED[name]
    if most_steps is not None and "steps" in kwargs:
        kwargs = {**kwargs, "steps": min(most_steps, kwargs["steps"])}
    return importlib.import_module(f"peers.{module}").quantize(model, DLQATConfig(**setting), batches, **kwargs)


def prepare(name: str, model: PreTrainedModel, setting: dict[str, Any], calibration: Batches, steps: int) -> Prepared:
    """A contender that is to be trained.

    Args:
        name: in `OURS` or `TRAINED`.
        model: taken over.
        setting: arguments of `DLQATConfig`.
        calibration: batches to calibrate a method of the package on.
        steps: how many optimiser steps of these; 0 only fits to the layers' inputs.
    """
    setting = with_divisors(model, setting)
    if name in TRAINED:
        return importlib.import_module(f"peers.{TRAINED[name]}").prepare(model, DLQATConfig(**setting))
    adapted = get_peft_model(model, DLQATConfig(**{**setting, **OURS[name]}, task_type="CAUSAL_LM"))
    calibrate(adapted, calibration, steps=steps, progress=False)
    optimizer = create_dlqat_optimizer(adapted, torch.optim.AdamW, lr=1.0)
    return Prepared(
        adapted,
        [{"params": group["params"], "lr_factor": group["lr"]} for group in optimizer.param_groups],
        lambda: copy.deepcopy(adapted).merge_and_unload(safe_merge=True),
    )
