"""w_hat kept from one forward pass to the next, as long as nothing that makes it changes: for generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .record import sample

# Rows of an input up to which it is kept. With more the product costs more than the weight does, and a model that is
# evaluated need not hold its weights twice.
MOST_ROWS = 64
_SAMPLE = 64  # values of W0: each costs a cache line


class KeptWeight:
    """A layer's w_hat, and all that it was made of. A copy of it, or a pickle, is empty.

    A tensor's identity and version do not tell of a change, since `.data.copy_` leaves both. So numbers are compared.
    Of W0, which nobody trains, these are its place, its version and a sample.
    """

    def __init__(self) -> None:
        self._content: tuple[Any, list[torch.Tensor], torch.Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return KeptWeight, ()

    def clear(self) -> None:
        """Let w_hat go."""
        self._content = None

    def get(
        self,
        settings: tuple[Any, ...],
        weight: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        rows: int,
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor | None:
        """w_hat, kept or made; None where it is not kept, and not to be kept for so few rows.

        Args:
            settings: all beside tensors that it depends on, compared by `==`.
            weight: W0.
            tensors: all else that it is made of.
            rows: of the input.
            make: makes it.
        """
        content = self._content  # once: other threads may run
        if content is None and rows > MOST_ROWS:
            return None
        found = [sample(weight, _SAMPLE), *tensors]
        key = (*settings, weight.data_ptr(), weight._version, weight.shape, weight.stride())
        if content is not None and content[0] == key and all(map(torch.equal, found, content[1])):
            return content[2]
        if rows > MOST_ROWS:
            self.clear()
            return None
        with torch.inference_mode(False), torch.no_grad():
            copies = [tensor.detach().clone() for tensor in found]
            w_hat = make()
        self._content = key, copies, w_hat
        return w_hat
