"""A format as a file of it is written again: copied, with the adapted weights in their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import Add, Format, Outline, TensorInfo
from .origin import Origin


def writer_of(target: Format, outline: Outline) -> Format:
    """What writes a model in a format: where it was opened from a file of this format, what writes that file again."""
    origin = outline.origin
    return target if origin is None or origin.format != target.name else Copied(target, origin)


class Copied(Format):
    """The format of a file that is written again. It holds what it holds, in the types that it has.

    Args:
        target: its format.
        origin: the file.
    """

    def __init__(self, target: Format, origin: Origin) -> None:
        self._target, self._origin = target, origin
        self.name, self.files, self.library = target.name, target.files, target.library
        self.usage, self.engines = target.usage, target.engines

    def holds(self, grid: Grid) -> bool:
        """Of the file: all."""
        return True

    def problem(self, grid: Grid, shape: tuple[int, int] | None = None, conv1d: bool = False) -> str:
        """None."""
        return ""

    def advice(self, grid: Grid, in_features: int | None = None) -> str:
        """None."""
        return ""

    def stored_as(self, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
        """The format's own name for it."""
        return self._target.stored_as(grid, dtype)[0], grid.bits_per_weight()

    def fit(self, tensor: TensorInfo, weight: QuantizedWeight, grid: Grid) -> torch.Tensor | QuantizedWeight:
        """As it is: its numbers are of the file's types."""
        return weight

    def rounded(self, outline: Outline, tensor: TensorInfo, value: torch.Tensor) -> torch.Tensor:
        """As the file has it."""
        return self._origin.exact(tensor.name, value)

    def narrowed(self, outline: Outline, dense: Iterable[tuple[TensorInfo, torch.Tensor]]) -> Outline:
        """The file's types stay."""
        return outline

    def size(self, outline: Outline) -> int:
        """The file's own."""
        return self._origin.size

    def json_files(self, outline: Outline) -> dict[str, dict[str, Any]]:
        """Those of a folder are copied."""
        return {} if self._origin.is_folder else self._target.json_files(outline)

    @contextmanager
    def writing(self, folder: Path, outline: Outline, notes: list[str]) -> Iterator[Add]:
        """The adapted weights; all else is there."""
        with self._origin.written_to(folder, list(outline.adapted)) as put:

            def add(tensor: TensorInfo, value: torch.Tensor | QuantizedWeight) -> None:
                if isinstance(value, QuantizedWeight):
                    put(tensor.name, value)

            yield add
