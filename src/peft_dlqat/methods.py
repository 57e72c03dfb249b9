"""The methods: rows of one formula. Each says which tensors it trains, and what they make of the quantizer.

    w_hat = scale * (clip(round((W0 + update) / step + rounding_zero)) - zero)            see `quant.naive`

    method    arXiv        step, rounding zero          scale, zero                 trained
    DL-QAT    2504.09223   s, z                         m * s, z                    A, B, m, and shift beside an offset
    LR-QAT    2406.06385   s, z; BA counts in steps     m * s, z                    A, B, m (the learned scale over s)
    L4Q       2402.04902   m * s, z + shift             m * s, z + shift            A, B, m, shift
    PEQA      2305.14152   s, z; no update              m * s, z                    m
    QA-LoRA   2309.14717   s, b; no update              s, b + scaling * t * BA     A [r, n_groups], B

To add a method, write a class and put it into `METHODS`. Nothing else has to know of it: saving, loading, merge,
export, learning rates and the fit by blocks ask the method.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .quant.grid import Grid, ZeroPoint
from .quant.quantizer import Quantizer

Magnitude = Literal["group", "row", "none"]
MAGNITUDES: tuple[Magnitude, ...] = ("group", "row", "none")


@dataclass(frozen=True)
class AdapterTensors:
    """One adapter's tensors in one layer.

    Attributes:
        grid: the format of the codes.
        scaling: lora_alpha / r, times the units of A and B.
        s: calibrated scale, frozen while training [out, n_groups].
        zero: calibrated zero: z, b, or None [out, n_groups].
        trained: the values of the method's own tensors, by name; of A and B the parameters, see `scaling`.
        others: values of the config's further layer settings, see `layer_spec`.
    """

    grid: Grid
    scaling: float
    s: torch.Tensor
    zero: torch.Tensor | None
    trained: Mapping[str, torch.Tensor]
    others: Mapping[str, Any]


@dataclass(frozen=True)
class TrainedTensor:
    """What must be known of a tensor that trains.

    Its parameter counts from the start, in units: value = start + unit * parameter. Adam moves every parameter by
    about the learning rate, so the unit says how far the value moves. With these units LoRA's learning rates are right
    for all of them, and weight decay pulls each to its start. See `layer_spec.unit_of` for an adapter's own.

    Attributes:
        shape: its shape.
        start: its value in a fresh adapter. None: drawn at random, as LoRA's A is; such a tensor does not tell whether
            the adapter was trained.
        unit: a power of two, so that no value is rounded by it. A method gives it over the adapter's own.
        in_scaling: whether the method gets the parameter, and its unit as a factor of `AdapterTensors.scaling`: so it
            is with A and B, of which only the product counts.
        block_step: in a calibration by blocks, how far a learning rate of 1 moves the value; or a function that says
            how far it moves the parameter.
    """

    shape: tuple[int, ...]
    start: float | None
    unit: float = 1.0
    in_scaling: bool = False
    block_step: float | Callable[[AdapterTensors], float] = 1.0

    def value(self, parameter: torch.Tensor) -> torch.Tensor:
        """What the parameter stands for."""
        return torch.rsub(parameter, self.start or 0.0, alpha=-self.unit)  # one kernel

    def parameter(self, value: torch.Tensor) -> torch.Tensor:
        """What stands for the value; exact unless it lies further below its start than half of it."""
        return (value - (self.start or 0.0)) / self.unit


# Steps of the grid by which `block_step` of B moves a weight. Of 0.05 to 2, 0.2 and 0.6 gave the lowest divergence on
# a small pretrained Llama, at 2 and at 3 bits.
_UPDATE = 0.4


def _size_of_a(tensors: AdapterTensors) -> float:
    return tensors.trained["A"].abs().mean().item()


def _block_step_of_a(tensors: AdapterTensors) -> float:
    return 10 * _size_of_a(tensors)  # smaller ones gave a higher divergence on that model at 3 bits


def _block_step_of_b(tensors: AdapterTensors) -> float:
    return _UPDATE / (_size_of_a(tensors) * math.sqrt(len(tensors.trained["A"])) * tensors.scaling)


def low_rank(out_features: int, columns: int, r: int) -> dict[str, TrainedTensor]:
    """A [r, columns] and B [out, r]."""
    return {
        "A": TrainedTensor((r, columns), None, in_scaling=True, block_step=_block_step_of_a),
        "B": TrainedTensor((out_features, r), 0.0, in_scaling=True, block_step=_block_step_of_b),
    }


def shift(out_features: int, n_groups: int, unit: float = 1.0) -> dict[str, TrainedTensor]:
    """A move of the zero [out, n_groups], in codes."""
    return {"shift": TrainedTensor((out_features, n_groups), 0.0, unit)}


@dataclass(frozen=True)
class Method(ABC):
    """One row of the formula.

    Attributes:
        magnitude: what m scales: "group", "row", or "none" where there is none.
        name: what users write.
        number: what saved adapters know it by; never changed.
        title: its name in prose.
        arxiv: its paper.
        magnitudes: those that go with it, its own first.
        zero_points: kinds of zero that go with it.
        trains_step: whether what W0 is divided by moves while training.
        unit: of m and shift, see `TrainedTensor`.
        lowrank: whether gradient="lowrank" goes with it, where no magnitude is a group's (see `quant.lowrank`).
    """

    magnitude: Magnitude = "group"

    name: ClassVar[str]
    number: ClassVar[int]
    title: ClassVar[str]
    arxiv: ClassVar[str]
    magnitudes: ClassVar[tuple[Magnitude, ...]] = ("group",)
    zero_points: ClassVar[tuple[ZeroPoint, ...]] = ("none", "integer", "float")
    trains_step: ClassVar[bool] = False
    unit: ClassVar[float] = 1.0
    lowrank: ClassVar[bool] = False

    @abstractmethod
    def trained(self, grid: Grid, out_features: int, n_groups: int, r: int) -> dict[str, TrainedTensor]:
        """The tensors that train, by name."""

    @abstractmethod
    def quantizer(self, tensors: AdapterTensors) -> Quantizer:
        """The way of W0 into the grid and out of it, differentiable in what trains."""

    def _magnitude(self, out_features: int, n_groups: int) -> dict[str, TrainedTensor]:
        if self.magnitude == "none":
            return {}
        shape = (out_features, n_groups if self.magnitude == "group" else 1)
        return {"magnitude": TrainedTensor(shape, 1.0, self.unit, block_step=0.5)}


class DLQAT(Method):
    """m * Quantize(W0 + scaling * tBA; s, b) + s * shift       (arXiv 2504.09223, eq. 3 and 4).

    The paper has no shift: what m is to the scale, shift is to the offset, which files keep as a number of its own.
    Nor has it t, the unit of B. `magnitude="none"` is the paper's ablation; it leaves out the shift too.
    """

    name, number, title, arxiv = "dlqat", 0, "DL-QAT", "2504.09223"
    magnitudes = ("group", "row", "none")
    lowrank = True

    def trained(self, grid: Grid, out_features: int, n_groups: int, r: int) -> dict[str, TrainedTensor]:
        """A, B, m and, beside an offset, shift."""
        tensors = {
            **low_rank(out_features, n_groups * grid.group_size, r),
            **self._magnitude(out_features, n_groups),
        }
        has_shift = grid.zero_point == "float" and self.magnitude != "none"
        return {**tensors, **(shift(out_features, n_groups) if has_shift else {})}

    def quantizer(self, tensors: AdapterTensors) -> Quantizer:
        """Rounded by s and z or b, decoded by m * s and z or m * b + s * shift."""
        scale, zero = _scaled(tensors)
        moved = tensors.trained.get("shift")
        if moved is not None and zero is not None:
            zero = zero + tensors.s * moved
        return _quantizer(tensors, *_low_rank_in_steps(tensors), tensors.s, tensors.zero, scale, zero)


class LRQAT(Method):
    """s * (clip(round(W0 / s0 + z + scaling * BA)) - z)       (arXiv 2406.06385).

    s0 and z are calibrated; the learned scale s trains as m = s / s0. Beside DL-QAT only the unit of BA differs: the
    step of its group, not the mean of its row's. With one scale a row the two are one.
    """

    name, number, title, arxiv = "lrqat", 1, "LR-QAT", "2406.06385"

    def trained(self, grid: Grid, out_features: int, n_groups: int, r: int) -> dict[str, TrainedTensor]:
        """A, B and m."""
        return {**low_rank(out_features, n_groups * grid.group_size, r), **self._magnitude(out_features, n_groups)}

    def quantizer(self, tensors: AdapterTensors) -> Quantizer:
        """Rounded by s0, decoded by s."""
        A, B = tensors.trained["A"], tensors.trained["B"]
        return _quantizer(tensors, A, B, tensors.s, tensors.zero, *_scaled(tensors), update_in_steps=True)


class L4Q(Method):
    """Quantize(W0 + scaling * tBA; s, z), with s = m * s0, z = z0 + shift or b = b0 + s0 * shift (arXiv 2402.04902).

    So scale and zero train in units of the calibrated ones. This is also the row "learn s, b" of DL-QAT's ablation.
    """

    name, number, title, arxiv = "l4q", 2, "L4Q", "2402.04902"
    trains_step = True
    unit = 0.5  # m rounds here, and in the others' unit it would move all codes of its group

    def trained(self, grid: Grid, out_features: int, n_groups: int, r: int) -> dict[str, TrainedTensor]:
        """A, B, m and, where the grid has a zero, shift."""
        tensors = {**low_rank(out_features, n_groups * grid.group_size, r), **self._magnitude(out_features, n_groups)}
        return tensors if grid.zero_point == "none" else {**tensors, **shift(out_features, n_groups, self.unit)}

    def quantizer(self, tensors: AdapterTensors) -> Quantizer:
        """Rounded and decoded by the same s and zero."""
        grid, zero, moved = tensors.grid, tensors.zero, tensors.trained.get("shift")
        s = _lsq_gradient(tensors.trained["magnitude"], grid) * tensors.s
        if moved is not None and zero is not None:
            moved = _lsq_gradient(moved, grid)
            s = s.abs()  # a step that training takes through zero would turn the grid over
            integer = grid.zero_point == "integer"
            zero = (zero + moved).clamp(grid.qmin, grid.qmax) if integer else zero + tensors.s * moved
        return _quantizer(tensors, *_low_rank_in_steps(tensors), s, zero, s, zero)


class PEQA(Method):
    """m * Quantize(W0; s, b): the codes of W0 are kept, only their scale trains       (arXiv 2305.14152).

    Also the end-to-end stage of EfficientQAT (E2E-QP, arXiv 2407.11062).
    """

    name, number, title, arxiv = "peqa", 3, "PEQA", "2305.14152"

    def trained(self, grid: Grid, out_features: int, n_groups: int, r: int) -> dict[str, TrainedTensor]:
        """m alone."""
        return self._magnitude(out_features, n_groups)

    def quantizer(self, tensors: AdapterTensors) -> Quantizer:
        """Rounded by s and b, decoded by m * s and m * b."""
        return _quantizer(tensors, *_no_update(tensors), tensors.s, tensors.zero, *_scaled(tensors))


class QALoRA(Method):
    """Quantize(W0; s, b) + scaling * tBA, A the same for all inputs of a group       (arXiv 2309.14717).

    The update is constant in each group, and so a part of its offset. Merging is exact, but needs real-valued offsets:
    `zero_point="float"`.
    """

    name, number, title, arxiv = "qalora", 4, "QA-LoRA", "2309.14717"
    magnitudes = ("none",)
    zero_points = ("float",)

    def trained(self, grid: Grid, out_features: int, n_groups: int, r: int) -> dict[str, TrainedTensor]:
        """A [r, n_groups], and B."""
        return low_rank(out_features, n_groups, r)

    def quantizer(self, tensors: AdapterTensors) -> Quantizer:
        """Rounded by s and b, decoded by s and b + scaling * tBA."""
        A, B = _low_rank_in_steps(tensors)
        assert tensors.zero is not None
        with torch.autocast(A.device.type, enabled=False):
            zero = torch.addmm(tensors.zero, B, A, alpha=tensors.scaling)
        return _quantizer(tensors, *_no_update(tensors), tensors.s, tensors.zero, tensors.s, zero)


METHODS: dict[str, type[Method]] = {method.name: method for method in (DLQAT, LRQAT, L4Q, PEQA, QALoRA)}


def _quantizer(tensors: AdapterTensors, *parts: Any, update_in_steps: bool = False) -> Quantizer:
    """Of A, B, step, rounding zero, scale and zero."""
    A, B, step, rounding_zero, scale, zero = parts
    return Quantizer(tensors.grid, tensors.scaling, A, B, step, rounding_zero, scale, zero, update_in_steps)


def _low_rank_in_steps(tensors: AdapterTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A, and tB: B counts in units of t [out, 1], the mean step |s| of its row.

    Adam moves every number by about the learning rate. In units of the step, one rate moves the codes of all rows and
    layers alike, whatever the size of their weights.
    """
    s = tensors.s.detach() if tensors.s.requires_grad else tensors.s
    return tensors.trained["A"], s.abs().mean(1, keepdim=True) * tensors.trained["B"]


def _no_update(tensors: AdapterTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of rank 0, whose product is zero: the codes are those of W0."""
    out_features, n_groups = tensors.s.shape
    return tensors.s.new_zeros(0, n_groups * tensors.grid.group_size), tensors.s.new_zeros(out_features, 0)


def _scaled(tensors: AdapterTensors) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero by which codes are decoded when m multiplies the weight: m * s, and z itself or m * b."""
    m, zero = tensors.trained.get("magnitude"), tensors.zero
    if m is None:
        return tensors.s, zero
    return m * tensors.s, m * zero if zero is not None and tensors.grid.zero_point == "float" else zero


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


def _lsq_gradient(tensor: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The tensor itself, its gradient times LSQ's 1 / sqrt(group_size * qmax) (arXiv 1902.08153, sec. 2.2).

    A group's weights add up in the gradient of its step. Without the factor that gradient dwarfs the weights' own, and
    where the norm of all gradients together is clipped, nothing else would move. Adam alone does not notice.
    """
    return _ScaleGradient.apply(tensor, (grid.group_size * grid.qmax) ** -0.5)
