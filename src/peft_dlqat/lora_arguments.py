"""The arguments of PEFT's `LoraConfig`, for a script that becomes one of DL-QAT: each is taken, or explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig
from peft.config import PeftConfig

from .messages import shown

MERGE_IT = (
    "merge it yourself, PeftModel.from_pretrained(model, lora).merge_and_unload(), save that model, and begin with it"
)
# What a plain LoRA adapter has not: with it, its model is not W0 + scaling * BA.
_NOT_PLAIN = {
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}
_INITS_ON_W0 = (True, False, "gaussian", "eva", "orthogonal")
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


def check_mergeable(config: PeftConfig, lora: str) -> None:
    """Refuse a trained adapter whose model is not W0 + scaling * BA, with the base model's W0.

    Args:
        config: the adapter's.
        lora: its folder or hub id.

    Raises:
        ValueError: naming what it has beside A and B.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"lora={lora!r} holds a {config.peft_type} adapter, not a LoRA; {MERGE_IT}.")
    own = {name: value for name in _NOT_PLAIN if (value := getattr(config, name, None)) not in (None, [])}
    own = {name: value for name, value in own.items() if value != _NOT_PLAIN[name]}
    if config.init_lora_weights not in _INITS_ON_W0:  # such as PiSSA's, which takes a part out of W0
        own["init_lora_weights"] = config.init_lora_weights
    if own:
        parts = ", ".join(f"{name}={shown(value)}" for name, value in own.items())
        raise ValueError(f"lora={lora!r} is no plain LoRA, but has {parts}; {MERGE_IT}.")
