"""How large a model will be in a format, before anything is written."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from .base import Format, Outline


@dataclass(frozen=True)
class ExpectedFile:
    """The model's weights in one format.

    Attributes:
        format: its name.
        stored: types that the quantized weights have in it.
        bits_per_weight: of the quantized weights, on average.
        size: bytes of the files of weights, to within 2 %; 0 where there can be none.
        advice: what would store the weights in about the bits that they have, where the format takes more.
        problem: why the format cannot hold the model exactly.
    """

    format: str
    stored: str = ""
    bits_per_weight: float = math.nan
    size: int = 0
    advice: str = ""
    problem: str = ""

    def __str__(self) -> str:
        """In a line, without the format's name."""
        if self.problem:
            return f"none: {self.problem.removeprefix(f'{self.format} ')}"
        advice = f"; {self.advice}" if self.advice else ""
        return f"{megabytes(self.size):>8}  {self.stored}, {self.bits_per_weight:.2f} bits a weight{advice}"


def expected_file(target: Format, outline: Outline) -> ExpectedFile:
    """What a format will make of what is to be written, see [`ExpectedFile`]."""
    adapted = {tensor.name: tensor for tensor in outline.tensors if tensor.grid is not None}
    for tensor in adapted.values():
        assert tensor.grid is not None
        if problem := target.problem(tensor.grid, tensor.out_in, tensor.transposed):
            return ExpectedFile(target.name, problem=problem)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the export itself will warn
            target.check_model(outline)
    except ImportError:
        pass  # without the format's package, its check of names waits
    except ValueError as error:
        return ExpectedFile(target.name, problem=str(error).rstrip("."))
    sizes = {name: math.prod(tensor.shape) for name, tensor in adapted.items()}
    stored = {name: target.stored_as(grid, outline.dtype) for name, grid in target.grids(outline).items()}
    return ExpectedFile(
        format=target.name,
        stored=" and ".join(dict.fromkeys(name for name, _ in stored.values())),
        bits_per_weight=sum(sizes[name] * bits for name, (_, bits) in stored.items()) / sum(sizes.values()),
        size=target.size(outline),
        advice=target.advice_for(outline),
    )


def megabytes(number: int) -> str:
    """Bytes in a unit to read, to within 0.5 %."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.{1 if number >= 10 * size else 2}f} {unit}"
    return f"{number / 1e3:.0f} kB"
