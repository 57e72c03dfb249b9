"""The one differentiable op of the package, behind a torch.library schema.

`fake_quantize_linear` takes the frozen weight, the low-rank factors and the quantizer's state, and returns the layer's
output. Registered as a custom op, it is opaque to torch.compile (no graph break, the same bits compiled or not) and
one name under which faster kernels can be registered for a device.
"""

from __future__ import annotations

from typing import Any

import torch

from ..grid import Grid
from . import reference

_ARGUMENTS = ("x", "bias", "weight", "A", "B", "magnitude", "scale", "zero")


@torch.library.custom_op("peft_dlqat::fake_quantize_linear", mutates_args=())
def _fake_quantize_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    magnitude: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scaling: float,
    bits: int,
    group_size: int,
    zero_point: str,
    scale_dtype: torch.dtype,
    fan_in_fan_out: bool,
) -> torch.Tensor:
    grid = Grid(bits, group_size, zero_point, scale_dtype)  # type: ignore[arg-type]
    return reference.forward(x, bias, weight, A, B, magnitude, scale, zero, grid, scaling, fan_in_fan_out)


@_fake_quantize_linear.register_fake
def _(x: torch.Tensor, bias: Any, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, weight, A, B, magnitude, scale, zero, scaling, bits, group_size, zero_point, scale_dtype, fan = inputs
    ctx.save_for_backward(x, weight, A, B, magnitude, scale, zero)
    ctx.constants = (Grid(bits, group_size, zero_point, scale_dtype), scaling, fan)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=False))
    with torch.autocast(grad.device.type, enabled=False):
        grads = reference.backward(grad, needs, *ctx.saved_tensors, *ctx.constants)
    return (*(grads.get(name) for name in _ARGUMENTS), *(None for _ in range(6)))


_fake_quantize_linear.register_autograd(_backward, setup_context=_setup_context)


def fake_quantize_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    magnitude: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Grid,
    scaling: float,
    fan_in_fan_out: bool = False,
) -> torch.Tensor:
    """`F.linear(x, m * Quantize(W0 + scaling * BA; s, zero), bias)`, differentiable by straight-through rounding.

    Differentiable in x, bias, A, B, magnitude, scale and zero, never in the frozen weight. The weight's arithmetic is
    float32; the product runs in the dtype of x. Between forward and backward only the arguments are kept.

    Args:
        x: input [..., in].
        bias: [out] in the dtype of x, or None.
        weight: W0 [out, in] ([in, out] with `fan_in_fan_out`), any floating dtype.
        A: [r, in].
        B: [out, r].
        magnitude: m [out, n_groups].
        scale: s [out, n_groups].
        zero: z or b [out, n_groups], or None where `grid.zero_point` is "none".
        grid: the grid, with `grid.group_size * n_groups == in`.
        scaling: lora_alpha / r.
        fan_in_fan_out: whether the weight is stored transposed, as transformers' Conv1D does.

    Returns:
        y [..., out], in the dtype of x.
    """
    return _fake_quantize_linear(
        x,
        bias,
        weight,
        A,
        B,
        magnitude,
        scale,
        zero,
        scaling,
        grid.bits,
        grid.group_size,
        grid.zero_point,
        grid.scale_dtype,
        fan_in_fan_out,
    )


__all__ = ["fake_quantize_linear"]
