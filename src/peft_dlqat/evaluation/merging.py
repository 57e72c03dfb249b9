"""Merged weights for the time of a measurement: an adapter that isn't merged quantizes anew in every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..layer import DLQATLayer


def dlqat_layers(model: nn.Module) -> list[DLQATLayer]:
    """All layers with DL-QAT adapters; none for a model without."""
    return [module for module in model.modules() if isinstance(module, DLQATLayer)]


@contextmanager
def temporarily_merged(model: nn.Module) -> Iterator[None]:
    """Merge the active adapters inside the block, and put the very tensors back after it.

    Layers that are merged already, or whose adapters are switched off, are left as they are. The merged weights take
    the memory of the adapted layers a second time.

    Args:
        model: any model; one without DL-QAT adapters is left alone.
    """
    merged: list[DLQATLayer] = []
    try:
        for layer in dlqat_layers(model):
            if not layer.merged and not layer.disable_adapters:
                layer.merge()
                if layer.merged:  # a layer without an active adapter stays as it is
                    merged.append(layer)
        yield
    finally:
        for layer in merged:
            layer.unmerge()
