"""What an adapter's tensors mean, as numbers that are saved beside them."""

from __future__ import annotations

import torch

from .methods import METHODS, Method
from .quant.grid import SCALE_DTYPES, ZERO_POINTS, Grid

_FIELDS = ("bits", "group_size", "zero_point", "scale_dtype", "lora scaling", "method", "stored bits", "format")
# What the position in a list stands for.
_CHOICES = {"zero_point": ZERO_POINTS, "scale_dtype": tuple(SCALE_DTYPES), "method": tuple(METHODS)}
STORED_BITS = _FIELDS.index("stored bits")
_FORMAT = 2  # to be raised when the tensors' meaning changes; in 2, B counts in units of the step


def encode_spec(grid: Grid, scaling: float, method: Method, stored_bits: int = 0) -> torch.Tensor:
    """What an adapter's tensors mean, float32 [8], saved with them.

    [bits, group_size, zero_point, scale_dtype, scaling, method, stored_bits, format]; zero_point, scale_dtype and
    method are positions in `grid.ZERO_POINTS`, `grid.SCALE_DTYPES` and `methods.METHODS`. Two configs can agree in
    every tensor's shape and name and still mean different weights (3 or 4 bits, say); loading compares this.
    """
    zero_point, scale_dtype, method_index = (
        _CHOICES[field].index(name)
        for field, name in (("zero_point", grid.zero_point), ("scale_dtype", grid.scale_name), ("method", method.name))
    )
    numbers = [grid.bits, grid.group_size, zero_point, scale_dtype, scaling, method_index, stored_bits, _FORMAT]
    return torch.tensor(numbers, device="cpu", dtype=torch.float32)


def spec_differences(found: torch.Tensor, own: torch.Tensor) -> list[str]:
    """The fields in which a file's spec is another than the layer's, in words."""
    return [
        f"{field}: {_in_words(field, file)} in the file, {_in_words(field, here)} here"
        for field, file, here in zip(_FIELDS, found.tolist(), own.tolist(), strict=True)
        if abs(file - here) > 1e-5 * abs(here)
    ]


def _in_words(field: str, value: float) -> object:
    choices = _CHOICES.get(field)
    if choices is not None:
        return repr(choices[int(value)]) if 0 <= value < len(choices) else value
    return round(value, 6) if value != int(value) else int(value)
