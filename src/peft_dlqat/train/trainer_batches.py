"""A Trainer's batches as a calibration needs them: the model's arguments, and nothing taken away from training."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from ..running import base_model, random_state_kept, unwrapped


class TrainerBatches:
    """The batches of a Trainer's loader, each as the model's arguments.

    Args:
        model: the model that trains.
        loader: the Trainer's; an iteration of these batches is one of it.
    """

    def __init__(self, model: nn.Module, loader: Iterable[Any]) -> None:
        self._model, self._loader = model, loader

    def __iter__(self) -> Iterator[Any]:
        """From the start."""
        for batch in self._loader:
            yield model_arguments(self._model, batch) or batch


def problem(model: nn.Module, loader: Iterable[Any]) -> str:
    """Why a Trainer's batches are nothing to calibrate on, in words; "" if they are.

    A stream that is read once belongs to training. Those of `datasets` start again each time, which is checked.

    Raises:
        ValueError: if one did not, so that rows are lost.
    """
    stream = isinstance(loader, Iterator) or isinstance(_dataset(loader), IterableDataset)
    if stream and not _of_datasets(_dataset(loader)):
        return "the training data is a stream, of which calibration would use up the first rows"
    first = _first(loader)
    if stream and not _same(first, _first(loader)):
        raise ValueError(
            "the training data gave other rows when it was read again: it is a stream that is read once, and rows of "
            "it are lost. Make it anew, and calibrate on other batches, DLQATCallback(calibration_dataloader=...)."
        )
    if first is None or model_arguments(model, first) is not None:
        return ""
    found = f"a dict of {sorted(first)}" if isinstance(first, Mapping) else f"a {type(first).__name__}"
    return f"a training batch is {found}, not the model's arguments"


def model_arguments(model: nn.Module, batch: Any) -> dict[str, Any] | None:
    """Of a Trainer's batch what the model's forward takes; None if that is not in it.

    Trainers with losses of their own (TRL's) put masks, margins and texts beside it. Of two sequences by the names
    `chosen_input_ids`, `rejected_input_ids` and so on, the chosen one is taken.
    """
    if not isinstance(batch, Mapping):
        return None
    base = base_model(unwrapped(model))
    main = getattr(base, "main_input_name", None)
    if main not in batch and f"chosen_{main}" in batch:
        batch = {key.removeprefix("chosen_"): value for key, value in batch.items() if key.startswith("chosen_")}
    names = _names(base)
    arguments = {key: value for key, value in batch.items() if names is None or key in names}
    there = {main, "inputs_embeds"} & arguments.keys() if main else arguments
    return arguments if there else None


@contextmanager
def order_kept(loader: Any) -> Iterator[None]:
    """After the block the loader's samplers, and the global generators, draw what they would have drawn without it."""
    generators = _generators(loader)
    states = [generator.get_state() for generator in generators]
    try:
        with random_state_kept():
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _names(base: nn.Module) -> set[str] | None:
    """Names of the arguments that the model's forward takes, or hands on to a model inside; None for any."""
    models = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
    parameters = [
        parameter for module in models or [base] for parameter in inspect.signature(module.forward).parameters.values()
    ]
    if not models and any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


def _dataset(loader: Any) -> Any:
    """The data set of a loader; accelerate wraps a stream where there are several processes."""
    dataset: Any = getattr(loader, "dataset", None)
    while isinstance(getattr(dataset, "dataset", None), IterableDataset):
        dataset = dataset.dataset
    return dataset


def _of_datasets(dataset: Any) -> bool:
    from datasets import IterableDataset as OfDatasets  # here: whoever has data of their own may do without it

    return isinstance(dataset, OfDatasets)


def _first(loader: Iterable[Any]) -> Any:
    """The first batch; None of an empty loader."""
    with order_kept(loader):
        return next(iter(loader), None)


def _same(one: Any, other: Any) -> bool:
    pairs = tree_leaves(one), tree_leaves(other)
    return len(pairs[0]) == len(pairs[1]) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)
        for a, b in zip(*pairs, strict=True)
    )


def _generators(loader: Any) -> list[torch.Generator]:
    """Those by which a loader, its samplers and what accelerate has wrapped around them draw."""
    found: dict[int, Any] = {}
    parts = [loader]
    while parts:
        part = parts.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            names = ("base_dataloader", "batch_sampler", "sampler", "generator", "synchronized_generator")
            parts += [getattr(part, name, None) for name in names]
    return [part for part in found.values() if isinstance(part, torch.Generator)]
