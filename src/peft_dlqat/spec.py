"""What an adapter's tensors mean, as numbers that are saved beside them."""

from __future__ import annotations

import torch

from .grid import SCALE_DTYPES, ZERO_POINTS, Grid
from .methods import METHODS, Method

STORED_BITS = 6  # position in the spec
_FORMAT = 2  # to be raised when the tensors' meaning changes; in 2, B counts in units of the step


def encode_spec(grid: Grid, scaling: float, method: Method, stored_bits: int = 0) -> torch.Tensor:
    """What an adapter's tensors mean, saved with them.

    [bits, group_size, zero_point, scale_dtype, scaling, method, stored_bits, format]; zero_point, scale_dtype and
    method are positions in `grid.ZERO_POINTS`, `grid.SCALE_DTYPES` and `methods.METHODS`. Two configs can agree in
    every tensor's shape and name and still mean different weights (3 or 4 bits, say); loading compares this.
    """
    zero_point = ZERO_POINTS.index(grid.zero_point)
    scale_dtype = list(SCALE_DTYPES).index(grid.scale_name)
    method_index = list(METHODS).index(method.name)
    numbers = [grid.bits, grid.group_size, zero_point, scale_dtype, scaling, method_index, stored_bits, _FORMAT]
    return torch.tensor(numbers, device="cpu", dtype=torch.float32)
