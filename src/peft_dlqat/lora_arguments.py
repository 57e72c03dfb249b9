"""The arguments of PEFT's `LoraConfig`, for a script that becomes one of DL-QAT: each is taken, or explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig

from .messages import shown

_OWN = "this is LoRA's own, and has no meaning where the update lies inside the quantizer; leave it out"
# Why an argument that is not as LoRA has it by default cannot be taken, and what to do instead.
_REASONS = {
    "lora_dropout": "there is no input of BA alone to drop values of, as BA is added to the weight; use weight_decay",
    "init_lora_weights": "PiSSA, LoftQ and the like begin at another W0, and DL-QAT's grid is fitted to the base "
    "model's; use True, or merge the other adapter first and begin with that model",
    "use_dora": "DL-QAT trains a magnitude already, one a group; magnitude='row' has one a row, as DoRA",
    "use_qalora": "use method='qalora', with group_size in the place of qalora_group_size",
    "qalora_group_size": "use method='qalora' with group_size",
    "trainable_token_indices": "single rows of an embedding do not train; use modules_to_save=['embed_tokens']",
    "target_parameters": "stacked experts are no linear layers, and stay in full precision; leave it out",
    "ensure_weight_tying": "a tied weight that trains or is quantized in one place gets a weight of its own there; "
    "leave it out",
    "layer_replication": "a layer has one frozen weight, and its replicas would share one grid; leave it out",
}


def _defaults() -> dict[str, Any]:
    found = {}
    for entry in fields(LoraConfig):
        made: Callable[[], Any] = entry.default_factory if entry.default_factory is not MISSING else lambda: None
        found[entry.name] = entry.default if entry.default is not MISSING else made()
    return found


def translated(arguments: Mapping[str, Any], known: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What arguments of a `LoraConfig` mean here.

    Args:
        arguments: by name, LoRA's and DL-QAT's own.
        known: names of DL-QAT's own, which stay as they are.

    Returns:
        The settings of a [`DLQATConfig`], and for each argument that is left out why, and what to do instead.
    """
    settings, left_out = {name: value for name, value in arguments.items() if name in known}, {}
    if settings.get("bias") == "lora_only":
        settings["bias"] = "dlqat_only"
    defaults = _defaults()
    for name, value in arguments.items():
        if name == "init_lora_weights" and isinstance(value, bool):
            settings["init_weights"] = value
        elif name not in known and name not in defaults:
            settings[name] = value  # for the constructor to refuse
        # Which way round a weight lies is seen by its layer's type.
        elif name not in known and name not in ("fan_in_fan_out", "megatron_core") and value != defaults[name]:
            left_out[name] = f"{name}={shown(value)}: {_REASONS.get(name, _OWN)}"
    return settings, left_out
