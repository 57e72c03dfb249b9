"""What goes into a model's decoder layers: finding the layers, seeing what they are called with, keeping it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from transformers.cache_utils import Cache

from .layer import DLQATLayer
from .placement import device_of, in_any_process
from .running import is_encoder_decoder, to_device

# A layer's arguments beside the hidden states: positional, by keyword.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class NoDecoderLayers(ValueError):
    """The model is not a list of decoder layers, each of which takes what the one before it returns."""


class HiddenStates:
    """One tensor [batch, length, hidden] a batch, on the CPU, in memory or in files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[int, torch.Tensor] = {}
        if folder is not None:
            folder.mkdir()

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._folder is None:
            return self._held[index]
        return torch.load(self._folder / f"{index}.pt", weights_only=True)

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        value = value.detach().cpu()
        if self._folder is None:
            self._held[index] = value
        else:
            torch.save(value, self._folder / f"{index}.pt")


@dataclass
class Hidden:
    """Inputs of the next decoder layer: in full precision (`teacher`), and given the quantized layers (`student`).

    `counted` says which positions count, bool [batch, length], or None for all.
    """

    teacher: HiddenStates
    student: HiddenStates
    counted: list[torch.Tensor | None] = field(default_factory=list)


@contextmanager
def hidden_states(cache_dir: str | Path | None) -> Iterator[Hidden]:
    """Room for hidden states; files are removed at the end, also after an exception.

    They lie in `cache_dir`/.hidden-states-*, which stays behind where a run is killed.
    """
    room = nullcontext() if cache_dir is None else tempfile.TemporaryDirectory("", ".hidden-states-", cache_dir)
    with room as folder:
        teacher, student = (None if folder is None else Path(folder) / name for name in ("teacher", "student"))
        yield Hidden(HiddenStates(teacher), HiddenStates(student))


def decoder_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """The decoder layers by module name: the members of the `nn.ModuleList` that holds most of the adapter's layers.

    Raises:
        NoDecoderLayers: if there is no such list.
    """

    def held(module: nn.Module) -> int:
        return sum(isinstance(m, DLQATLayer) and adapter_name in m.specs for m in module.modules())

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # The first of several with as many is the outermost.
    name = max(lists, key=lambda name: held(lists[name]), default=None)
    if name is None or held(lists[name]) == 0:
        raise NoDecoderLayers(
            f"{type(model).__name__} has no list of decoder layers (nn.ModuleList) with DL-QAT layers in it; use "
            "calibrate() with by='model' for it."
        )
    return {f"{name}.{index}": layer for index, layer in enumerate(lists[name])}


class _AllCaptured(Exception):
    """Ends a forward pass at the last decoder layer, or at one that did not get the input of the one before it."""


@torch.no_grad()
def capture(
    model: nn.Module, layers: list[nn.Module], batches: Iterable[Mapping[str, Any]], hidden: Hidden
) -> list[list[Call]]:
    """Run what comes before the decoder layers, and see what each of these is called with; none of them runs.

    Args:
        model: the model.
        layers: its decoder layers.
        batches: dicts of the model's keyword arguments.
        hidden: filled with the first layer's inputs.

    Returns:
        Arguments beside the hidden states, by batch and layer: masks and position embeddings can differ by layer. They
        are on the CPU, where those of all batches have room; tensors that layers share are kept once.

    Raises:
        NoDecoderLayers: if a layer is not called with what the one before it returned.
        ValueError: if there are no batches, or one is no dict, or no position of any counts.
    """
    if is_encoder_decoder(model):
        raise NoDecoderLayers("an encoder-decoder has two lists of layers, each with inputs of its own.")
    calls: list[list[Call]] = []
    device = device_of(model)
    for batch in batches:
        arguments = {key: value for key, value in to_device(batch, device).items() if key != "labels"}
        seen = _record(model, layers, arguments, as_tuple=False) or _record(model, layers, arguments, as_tuple=True)
        if not seen:
            raise NoDecoderLayers(
                f"{type(model).__name__} does not hand each decoder layer's output to the next as it is; use "
                "calibrate() with by='model' for it."
            )
        hidden.teacher[len(calls)] = hidden.student[len(calls)] = seen[0][0]
        mask = arguments.get("attention_mask")
        has_mask = isinstance(mask, torch.Tensor) and mask.shape == seen[0][0].shape[:-1]
        hidden.counted.append(mask.bool().cpu() if has_mask else None)  # type: ignore[union-attr]
        calls.append(_on_cpu([call for _, call in seen]))
    if not calls:
        raise ValueError("there are no calibration batches; give at least one.")
    if not in_any_process(any(counted is None or bool(counted.any()) for counted in hidden.counted), device):
        raise ValueError("all of the calibration batches' attention masks are 0; check how the batches are made.")
    return calls


def _on_cpu(calls: list[Call]) -> list[Call]:
    """The same calls, each tensor copied to the CPU once."""
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.cpu()
        return copies[id(tensor)]

    return recursively_apply(copy, calls)


def _record(
    model: nn.Module, layers: list[nn.Module], arguments: dict[str, Any], as_tuple: bool
) -> list[tuple[torch.Tensor, Call]]:
    """What each layer is called with where all return their input, or a tuple of it as Bloom's do.

    Empty if a layer does not get what the one before it returned.
    """
    seen: list[tuple[torch.Tensor, Call]] = []
    try:
        with _recording(layers, seen, as_tuple):
            model(**arguments)
    except _AllCaptured:
        pass
    except Exception:  # what a model does with a layer's output may not go with what it gets here
        if not seen:
            raise
    return seen if len(seen) == len(layers) and all(state is seen[0][0] for state, _ in seen) else []


@contextmanager
def _recording(layers: list[nn.Module], seen: list[tuple[torch.Tensor, Call]], as_tuple: bool) -> Iterator[None]:
    """Inside the block the layers return their input, and append what they are called with to `seen`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        state, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states", None), args)
        # A key-value cache would grow with every pass through a layer.
        positional = tuple(None if isinstance(value, Cache) else value for value in rest)
        keywords = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
        if "use_cache" in keywords:
            keywords["use_cache"] = False
        seen.append((state, (positional, keywords)))
        if len(seen) == len(layers) or state is not seen[0][0]:
            raise _AllCaptured
        return (state,) if as_tuple else state

    own: list[Callable[..., Any] | None] = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = before
