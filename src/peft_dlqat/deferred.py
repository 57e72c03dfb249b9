"""A weight that is computed when somebody computes with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

# What is asked of a weight without computing with it: T5 casts its activations to `wo.weight.dtype`, and many models
# read a weight's device.
_ATTRIBUTES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "itemsize", "nbytes")
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "get_device", "is_floating_point", "__len__")
_FREE = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(torch.Tensor, name) for name in _METHODS),
}


# What changes its first argument: `mul_`, `__imul__`, `w[0] = ...`, `w.data = ...`; and what changes no number of it.
_WRITES = re.compile(r"__(i(add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)|set|setitem)__|[^_].*_")
_HARMLESS = {
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_,
    torch.Tensor.retain_grad,
}
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class DeferredWeight(torch.Tensor):
    """The quantized weight of an adapter layer, as a parent module reads it.

    Shape, dtype and device are known at once. Everything else first computes the weight, once, and goes on with it.
    What would write into it, which would be lost, is refused with a RuntimeError.

    Args:
        compute: returns the weight.
        shape: of the weight.
        dtype: of the weight.
        device: of the weight.
    """

    _compute: Callable[[], torch.Tensor]
    _computed: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, compute: Callable[[], torch.Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> DeferredWeight:
        """As `torch.Tensor` subclasses are made: without memory of its own."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._compute, self._computed = compute, None
        return self

    def computed(self) -> torch.Tensor:
        """The weight itself."""
        if self._computed is None:
            self._computed = self._compute()
        return self._computed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever torch does with it."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FREE:
                return func(*args, **(kwargs or {}))
        if func == _DATA:  # as an object of this class, for what is written into it would be lost
            of, (weight,) = cls, args
            return of(lambda: weight.computed().detach(), weight.shape, weight.dtype, weight.device)
        if args and isinstance(args[0], cls) and func not in _HARMLESS and _WRITES.fullmatch(func.__name__):
            raise RuntimeError(
                f"{func.__name__} would change the weight of an adapter layer, which is computed anew each time; "
                "change base_layer.weight, or merge the adapter first."
            )
        args, kwargs = tree_map(lambda value: value.computed() if isinstance(value, cls) else value, (args, kwargs))
        return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What gets here has passed by `__torch_function__`, and would go on without a gradient."""
        raise RuntimeError(
            f"{func} reads the weight of an adapter layer past torch's Python functions; give it weight.clone()."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """That of the weight."""
        return repr(self.computed())
