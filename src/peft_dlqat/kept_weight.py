"""w_hat kept from one forward pass to the next, as long as nothing that makes it changes: for generation."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .record import sample

# Rows of an input up to which it is kept. With more the product costs more than the weight does, and a model that is
# evaluated need not hold its weights twice.
MOST_ROWS = 64
# Bytes of w_hat that all layers with packed weights keep together. They are packed to save memory: what a small model
# takes is no matter, and the weights of a large one are computed anew.
PACKED_BUDGET = 2**30
_SAMPLE = 64  # values of W0: each costs a cache line

_lock, _packed_bytes = threading.RLock(), 0  # `__del__` may come inside


class _Seen(NamedTuple):
    """A tensor that w_hat was made of: where it lies, and the bytes that it had."""

    place: tuple[int, int]
    bytes: bytearray

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Seen:
        return cls((tensor.data_ptr(), tensor.numel()), bytearray(_bytes_of(tensor)))

    def still(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is this one, and its numbers the same: compared as bytes, as fast as memory is read."""
        same_place = (tensor.data_ptr(), tensor.numel()) == self.place and _can_be_seen(tensor)
        return same_place and self.bytes == _bytes_of(tensor)


def _bytes_of(tensor: torch.Tensor) -> Any:
    """A view of a tensor's memory. Not by NumPy, after which FSDP could not give that memory back."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


class _Content(NamedTuple):
    key: tuple[Any, ...]
    seen: list[_Seen]
    sample: torch.Tensor  # of W0, in which its numbers are so far apart:
    stride: tuple[int, ...]
    w_hat: torch.Tensor


def _can_be_seen(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.dtype is torch.float32 and tensor.device.type == "cpu"


class KeptWeight:
    """A layer's w_hat, and all that it was made of. A copy of it, or a pickle, is empty.

    A tensor's identity and version do not tell of a change, since `.data.copy_` leaves both. So numbers are compared.
    Of W0, which nobody trains, these are its place, its version and a sample.
    """

    def __init__(self) -> None:
        self._content: _Content | None = None
        self._counted = 0  # of the budget

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return KeptWeight, ()

    def __del__(self) -> None:
        if self._counted and _lock is not None:  # as it is when Python ends
            self._count(0)

    def clear(self) -> None:
        """Let w_hat go."""
        self._content = None
        self._count(0)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        content = self._content
        return 0 if content is None else content.w_hat.nbytes + sum(len(seen.bytes) for seen in content.seen)

    def get(
        self,
        settings: tuple[Any, ...],
        weight: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        rows: int,
        make: Callable[[], torch.Tensor],
        budget: int = 0,
    ) -> torch.Tensor | None:
        """w_hat, kept or made; None where it is not kept, and not to be kept for so few rows.

        Args:
            settings: all beside tensors that it depends on, compared by `==`.
            weight: W0.
            tensors: all else that it is made of, float32 on the CPU.
            rows: of the input.
            make: makes it.
            budget: bytes of w_hat that count for `PACKED_BUDGET`; 0 for one that is kept in any case.
        """
        content = self._content  # once: other threads may run
        if content is None and (rows > MOST_ROWS or not self._has_room(budget)):
            return None
        key = (*settings, weight.data_ptr(), weight._version, weight.shape, weight.stride())
        if content is not None and content.key == key and len(tensors) == len(content.seen):
            same = all(seen.still(tensor) for seen, tensor in zip(content.seen, tensors, strict=True))
            of_weight = weight.as_strided(content.sample.shape, content.stride)  # `sample`, found quicker
            if same and torch.equal(of_weight, content.sample):
                return content.w_hat
        if rows > MOST_ROWS or not all(map(_can_be_seen, tensors)):
            self.clear()
            return None
        with torch.inference_mode(False), torch.no_grad():
            # Before it is made: other threads may write.
            seen, of_weight = [_Seen.of(tensor) for tensor in tensors], sample(weight, _SAMPLE)
            content = _Content(key, seen, of_weight.clone(), of_weight.stride(), make())
        self._content = content
        self._count(budget)
        return content.w_hat

    def _has_room(self, budget: int) -> bool:
        return not budget or _packed_bytes - self._counted + budget <= PACKED_BUDGET

    def _count(self, budget: int) -> None:
        global _packed_bytes
        with _lock:
            _packed_bytes += budget - self._counted
            self._counted = budget
