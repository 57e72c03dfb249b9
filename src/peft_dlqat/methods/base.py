"""What a method is: which tensors it trains, and the quantizer that they and the calibrated grid make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..quant.grid import Grid, ZeroPoint
from ..quant.quantizer import Quantizer

Magnitude = Literal["group", "row", "none"]
MAGNITUDES: tuple[Magnitude, ...] = ("group", "row", "none")


@dataclass(frozen=True)
class AdapterState:
    """One adapter's tensors in one layer; None for those that its method does not have.

    Attributes:
        grid: the grid.
        scaling: lora_alpha / r.
        s: calibrated scale, frozen while training [out, n_groups].
        zero: calibrated zero: z, b, or None [out, n_groups].
        A: trained low-rank factor.
        B: trained low-rank factor [out, r], in units of the step.
        magnitude: trained m [out, n_groups], or [out, 1] for one a row; starts at one.
        shift: trained move of the zero in units of codes [out, n_groups]; starts at zero.
    """

    grid: Grid
    scaling: float
    s: torch.Tensor
    zero: torch.Tensor | None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A, and tB: the trained B counts in units of t [out, 1], the mean step |s| of its row.

        Adam moves every number by about the learning rate. In units of the step, one rate moves the codes of all rows
        and layers alike, whatever the size of their weights.
        """
        assert self.A is not None and self.B is not None
        return self.A, self.s.detach().abs().mean(1, keepdim=True) * self.B

    @property
    def no_update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of rank 0, whose product is zero: the codes are those of W0."""
        out_features, n_groups = self.s.shape
        return self.s.new_zeros(0, n_groups * self.grid.group_size), self.s.new_zeros(out_features, 0)

    @property
    def scaled(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero by which codes are decoded when m multiplies the weight: m * s, and z itself or m * b."""
        if self.magnitude is None:
            return self.s, self.zero
        zero = self.zero
        if zero is not None and self.grid.zero_point == "float":
            zero = self.magnitude * zero
        return self.magnitude * self.s, zero


@dataclass(frozen=True)
class Method(ABC):
    """One row of the formula.

    Attributes:
        magnitude: what m scales: "group", "row", or "none" where there is none.
    """

    magnitude: Magnitude = "group"

    name: ClassVar[str]
    title: ClassVar[str]
    arxiv: ClassVar[str]
    magnitudes: ClassVar[tuple[Magnitude, ...]] = ("group",)
    trains_step: ClassVar[bool] = False  # whether what W0 is divided by moves while training
    magnitude_share: ClassVar[float] = 1.0  # of the recipe's learning rate of m and shift
    zero_points: ClassVar[tuple[ZeroPoint, ...]] = ("none", "integer", "float")

    def shapes(self, out_features: int, n_groups: int, grid: Grid, r: int) -> dict[str, tuple[int, ...]]:
        """Shape of each trained tensor, by its name in `AdapterState`: A, B and m where a method says nothing else."""
        low_rank = {"A": (r, n_groups * grid.group_size), "B": (out_features, r)}
        return {**low_rank, **self._magnitude_shape(out_features, n_groups)}

    @abstractmethod
    def quantizer(self, state: AdapterState) -> Quantizer:
        """The way of W0 into the grid and out of it, differentiable in what trains."""

    def _magnitude_shape(self, out_features: int, n_groups: int) -> dict[str, tuple[int, ...]]:
        columns = {"group": n_groups, "row": 1}
        return {} if self.magnitude == "none" else {"magnitude": (out_features, columns[self.magnitude])}


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


def lsq_gradient(tensor: torch.Tensor | None, grid: Grid) -> torch.Tensor | None:
    """The tensor itself, its gradient times LSQ's 1 / sqrt(group_size * qmax) (arXiv 1902.08153, sec. 2.2).

    A group's weights add up in the gradient of its step; without the factor that gradient dwarfs the weights' own, and
    where the norm of all gradients together is clipped, nothing else would move. Adam alone does not notice.
    """
    return None if tensor is None else _ScaleGradient.apply(tensor, (grid.group_size * grid.qmax) ** -0.5)
