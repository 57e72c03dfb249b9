"""Packing the frozen weights of a whole model, once the grid is frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layer import adapter_layers
from .storage import STORAGES


def pack_weights(model: nn.Module, adapter_name: str | None = None) -> None:
    """Keep the frozen weights of the adapted layers as the config's `storage` says, and let the full ones go.

    [`calibrate`] and the callback call it when the grid is frozen. Call it yourself after [`calibrate_blocks`], to
    train on the initial grid, or for an adapter that was trained on packed weights, and was loaded: it computes the
    same to the bit without, but packs anew in each forward pass. [`load_packed`] does both without the full model in
    memory. Nothing happens with storage="full", and nothing the second time.

    Args:
        model: a model with one DL-QAT adapter, not merged.
        adapter_name: defaults to the active one.

    Raises:
        ValueError: if there are several adapters, or it is merged.
    """
    adapter_name, layers = adapter_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr,index]
    if config.storage == "full":
        return
    for layer in layers.values():
        layer.pack(adapter_name, STORAGES[config.storage])
    config.record["storage"] = config.storage
