"""The reference policy of preference losses: a frozen copy of the adapter in the same model, by the name "ref".

TRL's trainers (DPO, KTO, GRPO, RLOO) copy the adapter's parameters when they are made, if the model has its adapter by
then. A calibration that comes later must take the copy along: the reference is the policy as training found it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ..layer import DLQATLayer
from .scales_and_zeros import put_values, scales_and_zeros

REFERENCE = "ref"  # TRL's name for it


def is_reference(layers: Collection[DLQATLayer], adapter_name: str) -> bool:
    """Whether there is a reference, and it is the adapter to the bit: settings, scales, zeros and what trains."""
    return adapter_name != REFERENCE and all(
        REFERENCE in layer.specs
        and torch.equal(layer.dlqat_spec[REFERENCE], layer.dlqat_spec[adapter_name])
        and all(map(torch.equal, _tensors(layer, REFERENCE), _tensors(layer, adapter_name)))
        for layer in layers
    )


def renew_reference(layers: Collection[DLQATLayer], adapter_name: str) -> None:
    """Make the reference the adapter to the bit again."""
    for layer in layers:
        put_values(_tensors(layer, REFERENCE), _tensors(layer, adapter_name))
        layer.dlqat_record[REFERENCE].copy_(layer.dlqat_record[adapter_name])


def full_precision_reference(args: Any, adapters: Collection[str]) -> bool:
    """Whether TRL's reference is the model with its adapters off; the trainer's arguments speak of a reference then.

    Args:
        args: the trainer's arguments.
        adapters: names of the model's adapters.
    """
    has_reference = any(hasattr(args, name) for name in ("sync_ref_model", "precompute_ref_log_probs"))
    return has_reference and getattr(args, "beta", None) != 0 and REFERENCE not in adapters


def _tensors(layer: DLQATLayer, adapter_name: str) -> list[torch.Tensor]:
    return [
        *scales_and_zeros(layer, adapter_name),
        *(parameter for _, parameter in layer.trained(adapter_name).values()),
    ]
