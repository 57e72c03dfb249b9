"""The one differentiable op of the package, behind a torch.library schema.

`fake_quantize_linear` takes the frozen weight and a `Quantizer`, and returns the layer's output. Registered as a
custom op, it is opaque to torch.compile (no graph break, the same bits compiled or not) and one name under which
faster kernels can be registered for a device.
"""

from __future__ import annotations

from typing import Any

import torch

from ..grid import Grid
from ..qweight import Quantizer
from . import reference

_ARGUMENTS = ("x", "bias", "weight", "A", "B", "step", "shift", "scale", "zero")


@torch.library.custom_op("peft_dlqat::fake_quantize_linear", mutates_args=())
def _fake_quantize_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    step: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    update_in_grid_units: bool,
    scaling: float,
    bits: int,
    group_size: int,
    zero_point: str,
    scale_dtype: torch.dtype,
    k_quant: bool,
    fan_in_fan_out: bool,
) -> torch.Tensor:
    grid = Grid(bits, group_size, zero_point, scale_dtype, k_quant)  # type: ignore[arg-type]
    quantizer = Quantizer(A, B, step, shift, scale, zero, update_in_grid_units)
    return reference.forward(x, bias, weight, quantizer, grid, scaling, fan_in_fan_out)


@_fake_quantize_linear.register_fake
def _(x: torch.Tensor, bias: Any, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, *tensors, in_units, scaling, bits, group_size, zero_point, scale_dtype, k_quant, fan = inputs
    ctx.save_for_backward(x, *tensors)
    ctx.constants = (in_units, Grid(bits, group_size, zero_point, scale_dtype, k_quant), scaling, fan)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=False))
    x, weight, A, B, step, shift, scale, zero = ctx.saved_tensors
    in_units, *constants = ctx.constants
    quantizer = Quantizer(A, B, step, shift, scale, zero, in_units)
    with torch.autocast(grad.device.type, enabled=False):
        grads = reference.backward(grad, needs, x, weight, quantizer, *constants)
    return (*(grads.get(name) for name in _ARGUMENTS), *(None for _ in range(8)))


_fake_quantize_linear.register_autograd(_backward, setup_context=_setup_context)


def fake_quantize_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    quantizer: Quantizer,
    grid: Grid,
    scaling: float,
    fan_in_fan_out: bool = False,
) -> torch.Tensor:
    """`F.linear(x, w_hat, bias)` with w_hat the quantized weight, differentiable by straight-through rounding.

    Differentiable in x, bias and all tensors of the quantizer, never in the frozen weight. The weight's arithmetic is
    float32; the product runs in the dtype of x. Between forward and backward only the arguments are kept.

    Args:
        x: input [..., in].
        bias: [out] in the dtype of x, or None.
        weight: W0 [out, in] ([in, out] with `fan_in_fan_out`), any floating dtype.
        quantizer: the low-rank update, and the way into the grid and out of it.
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
        quantizer.A,
        quantizer.B,
        quantizer.step,
        quantizer.shift,
        quantizer.scale,
        quantizer.zero,
        quantizer.update_in_grid_units,
        scaling,
        grid.bits,
        grid.group_size,
        grid.zero_point,
        grid.scale_dtype,
        grid.k_quant,
        fan_in_fan_out,
    )


__all__ = ["fake_quantize_linear"]
