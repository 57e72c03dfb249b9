"""Where a model keeps its modules: as children, and in whatever else a module may call them from."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Place = tuple[Any, Any]  # a container, and the key or index of a module in it
_MOST = 10**5  # objects that are looked through: behind a hook there may be a whole data set

# What these hold is no part of a model: a function's globals are looked at no more than a class or a library.
_NOT_ENTERED = (
    nn.Module,
    torch.Tensor,
    torch.dtype,
    torch.device,
    type,
    types.ModuleType,
    types.CodeType,
    types.BuiltinFunctionType,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
)


class _InTuple:
    """A tuple that is kept somewhere, as a container: to change an entry puts another tuple into its place."""

    def __init__(self, container: Any, key: Any) -> None:
        self._container, self._key = container, key

    def __getitem__(self, index: int) -> Any:
        return self._container[self._key][index]

    def __setitem__(self, index: int, value: Any) -> None:
        old = self._container[self._key]
        entries = [*old[:index], value, *old[index + 1 :]]
        self._container[self._key] = type(old)(*entries) if hasattr(old, "_fields") else type(old)(entries)


def places(model: nn.Module) -> dict[int, list[Place]]:
    """By id of a module: the places that keep it. Some modules are kept in several.

    A container is a module's dict of children or of attributes, or a list, dict or tuple that it keeps, in others too.
    """
    found: dict[int, list[Place]] = {}
    for module in model.modules():
        for container, key, value in _entries(vars(module), set()):
            if isinstance(value, nn.Module):
                found.setdefault(id(value), []).append((container, key))
    return found


def elsewhere(model: nn.Module) -> dict[int, str]:
    """By id of a module: an attribute of another one that leads to it past `places`, so that nobody can replace it.

    A set, an object, a bound method, a closure.
    """
    found: dict[int, str] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            for _, _, entry in _entries({attribute: value}, set()):
                for held in _held_by(entry, seen):
                    if held is not module:  # accelerate gives a module a forward that knows it
                        found.setdefault(id(held), f"{name}.{attribute}".lstrip("."))
    return found


def _entries(container: Any, seen: set[int]) -> Iterator[tuple[Any, Any, Any]]:
    """The entries of a container, and of those in it: the container, the key, and what is there."""
    held = container._container[container._key] if isinstance(container, _InTuple) else container
    if held is container:  # a tuple may be kept in several places, and is another one in each
        if id(held) in seen:
            return
        seen.add(id(held))
    for key, value in list(held.items()) if isinstance(held, dict) else list(enumerate(held)):
        yield container, key, value
        if isinstance(value, list | dict):
            yield from _entries(value, seen)
        elif isinstance(value, tuple):
            yield from _entries(_InTuple(container, key), seen)


def _held_by(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Modules that an object leads to, if it is neither a module nor a container of `places`."""
    if isinstance(value, (*_NOT_ENTERED, list, dict, tuple)):
        return
    waiting = [value]
    while waiting and len(seen) < _MOST:
        inner = waiting.pop()
        if isinstance(inner, nn.Module):
            yield inner
        if isinstance(inner, _NOT_ENTERED) or id(inner) in seen:
            continue
        seen.add(id(inner))
        if isinstance(inner, types.FunctionType):
            waiting += [inner.__closure__, inner.__defaults__, inner.__kwdefaults__, inner.__dict__]
        else:
            waiting += gc.get_referents(inner)
