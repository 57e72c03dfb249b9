"""The net under the adapter layers: one that takes part in nothing is an error, not a model that trains beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..layer import DLQATLayer
from ..running import base_model, unwrapped


@contextmanager
def all_layers_used(model: nn.Module, layers: Mapping[str, DLQATLayer]) -> Iterator[None]:
    """Watch the model run inside the block, and see that its adapter layers take part.

    A layer does if it is called, or its weight is read. What its parent does not run for (a vision tower without
    images, an expert without tokens, a layer that LayerDrop leaves out) says nothing.

    Args:
        model: what runs inside the block; nothing is checked if it does not run as a whole.
        layers: its adapter layers, by module name.

    Raises:
        ValueError: for a layer that was neither called nor read though its parent ran in every batch: training would
            not move it, and merging would change the model.
    """
    root = base_model(unwrapped(model))
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in layers}
    runs: Counter[int] = Counter()

    def count(module: nn.Module, _: Any) -> None:
        runs[id(module)] += 1

    with ExitStack() as hooks:
        for module in {root, *parents.values(), *layers.values()}:
            hooks.enter_context(module.register_forward_pre_hook(count))  # type: ignore[union-attr]
        for layer in layers.values():
            layer._was_read = False
        yield
    batches = runs[id(root)]
    unused = [
        name
        for name, layer in layers.items()
        if not layer._was_read and not runs[id(layer)] and batches and runs[id(parents[name])] >= batches
    ]
    if unused:
        raise ValueError(
            f"{len(unused)} adapter layers are neither called nor read by the modules that hold them, such as "
            f"{unused[0]}: training would not move them, and merging would change the model; name them in "
            "exclude_modules."
        )
