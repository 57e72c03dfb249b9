"""How the safetensors files of a folder keep quantized weights: what a format must say so that they can be read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..messages import shown
from ..quant.grid import Grid, ZeroPoint
from ..quant.quantizer import QuantizedWeight


class Layout(ABC):
    """How one folder keeps its quantized weights, as its config.json says.

    Attributes:
        format: name of the format that writes the same.
        parts: tensors of a weight, by their names within its module: along which dimension of each the outputs lie,
            packed or not. The first is part of every quantized weight, and of no other.
        fixed: tensors that are the same for all weights of a shape and grid, or left out; and what others would be.
        regexes: of the config, by which modules are found.
        models: `model_type` of the models whose tensors it has as transformers has them; None for all.
    """

    format: str
    parts: Mapping[str, int]
    fixed: Mapping[str, str]
    regexes: tuple[str, ...] = ()
    models: frozenset[str] | None = None

    @abstractmethod
    def grid(self, module: str, kinds: Iterable[str], in_features: int, scale_dtype: torch.dtype) -> Grid | None:
        """The grid of a module's weight; None if the config says that it is not quantized.

        Args:
            module: its name.
            kinds: names of its classes, its own first.
            in_features: columns of the weight.
            scale_dtype: of the scales in the file.

        Raises:
            ValueError: for settings that are not known here.
        """

    @abstractmethod
    def weight(self, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """The weight that a module's tensors stand for: the inverse of `tensors`.

        Args:
            tensors: by the names of `parts`, of all outputs or of some of them.
            grid: of the weight.

        Raises:
            ValueError: for tensors that mean something else than the config says.
        """

    @abstractmethod
    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """What the files hold of a weight, by the names of `parts` and `fixed`; of one on the meta device, too."""


def group_of(size: int, in_features: int) -> int:
    """Inputs that share a scale; -1 stands for all of them."""
    return in_features if size == -1 else size


def checked_grid(bits: Any, size: Any, zero_point: ZeroPoint, dtype: torch.dtype, allowed: Iterable[int]) -> Grid:
    """A grid of a config's numbers.

    Args:
        bits: of a code.
        size: inputs that share a scale.
        zero_point: kind of zero.
        dtype: of the scales.
        allowed: bits that the format has.

    Raises:
        ValueError: for what is no grid of the format.
    """
    if bits not in allowed or type(bits) is not int:
        raise ValueError(f"bits={shown(bits)} must be one of {', '.join(map(str, allowed))}")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"group_size={shown(size)} must be a positive integer, or -1")
    return Grid(bits, size, zero_point, dtype)


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes, uint8, counted from the middle, int8."""
    return (codes - 2 ** (bits - 1)).view(torch.int8)


def unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, int8, counted from the lowest, uint8."""
    return codes.view(torch.uint8) + 2 ** (bits - 1)


def unsigned_zeros(weight: QuantizedWeight) -> torch.Tensor:
    """Zero points counted from the lowest code, uint8 [out, n_groups]; those of a symmetric weight are the middle."""
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    return (zero - weight.grid.qmin).to(torch.uint8)


def signed_zeros(zeros: torch.Tensor, grid: Grid) -> torch.Tensor | None:
    """Zero points as a quantized weight has them, of those counted from the lowest code, uint8 [out, n_groups].

    Raises:
        ValueError: if the grid is symmetric, and they are not.
    """
    found = zeros.float() + grid.qmin
    if grid.zero_point == "integer":
        return found
    if found.any():
        raise ValueError(
            f"it is symmetric by its config, but a zero point is {int(zeros[found != 0][0])}, not {-grid.qmin}: the "
            "config is another file's, or of another version (GPTQ's version 1 stores one less than version 2)"
        )
    return None
