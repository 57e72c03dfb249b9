"""Packing the frozen weights of a whole model, once the scales are frozen."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .config import DLQATConfig
from .console import progress_bar
from .layer import DLQATLayer, adapter_layers
from .model import check_what_was_loaded
from .quant.fixed_point import IN_FILE


def pack_weights(model: nn.Module, adapter_name: str | None = None) -> None:
    """Keep the frozen weights of the adapted layers as the config's `storage` says, and let the full ones go.

    [`calibrate`] and the callback call it when the scales are frozen. Call it yourself to train on the initial scales.
    Call it too for a loaded adapter that was trained on packed weights: without, it computes the same to the bit, but
    packs anew in each forward pass. [`load_packed`] does both without the full model in memory. Nothing happens with
    storage="full", and nothing the second time. A warning says so where the adapter was trained on full weights, and
    packed ones change what it computes.

    Args:
        model: a model with one DL-QAT adapter, not merged, or with several of the same scales and zeros.
        adapter_name: defaults to the active one.

    Raises:
        ValueError: if there are adapters of other scales, or it is merged, or was trained on weights in another
            storage. No layer is packed then.
    """
    check_what_was_loaded(model)
    adapter_name, layers = adapter_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr,index]
    if config.storage in ("full", IN_FILE):
        return
    check_packable(layers.values(), adapter_name, config)
    warn_if_trained(layers.values(), adapter_name, config)
    for layer in progress_bar(layers.values(), desc="packing weights"):
        layer.frozen.pack(adapter_name, config.storage)


def check_packable(layers: Collection[DLQATLayer], adapter_name: str, config: DLQATConfig) -> None:
    """Raise what [`pack_weights`] would raise; changes nothing."""
    if config.storage not in ("full", IN_FILE):
        for layer in layers:
            layer.frozen.check_packable(adapter_name, config.storage)


def warn_if_trained(layers: Collection[DLQATLayer], adapter_name: str, config: DLQATConfig) -> None:
    """Warn where weights are about to be packed that an adapter has moved, as it was trained on full ones."""
    if config.init_weights and any(
        layer.specs[adapter_name].storage == "full" and _moves_codes(layer, adapter_name) for layer in layers
    ):
        warnings.warn(
            f"adapter {adapter_name!r} was trained on full weights, and storage={config.storage!r} changes what it "
            "computes: evaluate it again, or train on.",
            stacklevel=3,
        )


@torch.no_grad()
def _moves_codes(layer: DLQATLayer, adapter_name: str) -> bool:
    """Whether BA is not zero; without it the codes are those of W0, which every storage keeps."""
    B = layer.quantizer(adapter_name).B
    return not B.is_meta and bool(B.any())
