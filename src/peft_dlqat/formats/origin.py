"""Where the weights of a model come from that was opened as a quantized file has it, and how that is written again."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, ClassVar

import torch

from ..quant.quantizer import QuantizedWeight

CHUNK = 2**24  # bytes that are copied at a time
# Puts an adapted weight, by the model's name of it, into its place.
Put = Callable[[str, QuantizedWeight], None]


@dataclass(frozen=True)
class Origin(ABC):
    """The file, or folder of files, that a model's weights come from.

    Attributes:
        path: where it is.
        sha256: its checksum, in hexadecimal digits.
        names: the file's own name of each weight that is kept as the file has it, by the model's.
        checksums: of the model's tensors without a grid, see `record`; by the model's names.
        format: name of its format.
        is_folder: whether config, tokenizer and all else are a part of it.
    """

    path: Path
    sha256: str
    names: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    format: str = ""
    is_folder: ClassVar[bool] = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the file or files that hold the weights."""

    @abstractmethod
    def exact(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor without codes as the file has it, which may have more digits than the model's `value`."""

    @abstractmethod
    def written_to(self, folder: Path, replaced: Iterable[str]) -> AbstractContextManager[Put]:
        """Inside the block, call what it gives with the name and the value of each replaced weight.

        All else is copied. Of a replaced weight nothing is: its place is empty until it is written.

        Args:
            folder: where the copy goes.
            replaced: names of the weights that will come, as the model has them.

        Raises:
            ValueError: if the file is no longer the one that was opened.
        """

    def check_unchanged(self, sha256: str) -> None:
        """Refuse another file than the one that was opened.

        Raises:
            ValueError: if the checksum is another.
        """
        if sha256 != self.sha256:
            raise ValueError(
                f"{self.path} has changed since it was opened, and so cannot be written again; put it back as it was, "
                "or open the new one and train again."
            )


def copy_but(path: Path, new: BinaryIO, gaps: Iterable[tuple[int, int]]) -> str:
    """Copy a file but for some places, from start to end, which stay empty; returns the checksum of the whole."""
    gaps = list(gaps)
    digest, size, inside = hashlib.sha256(), path.stat().st_size, {start for start, _ in gaps}
    with path.open("rb") as old:
        for at, end in pairwise(sorted({0, size, *(bound for gap in gaps for bound in gap)})):
            for start in range(at, end, CHUNK):
                part = old.read(min(CHUNK, end - start))
                digest.update(part)
                if at not in inside:
                    new.seek(start)
                    new.write(part)
    new.truncate(size)
    return digest.hexdigest()
