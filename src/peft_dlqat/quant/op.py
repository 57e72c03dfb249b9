"""The one differentiable op of the package, behind a torch.library schema.

`fake_quantize_linear` takes the frozen weight and a `Quantizer`, and returns the layer's output. Forward and backward
are custom ops, opaque to torch.compile (no graph break, the same bits compiled or not).
"""

from __future__ import annotations

from typing import Any

import torch

from ..quant import product as linear
from .dispatch import compile_on_cpu, harden
from .grid import Grid
from .quantizer import Quantizer

_ARGUMENTS = ("x", "bias", "weight", "A", "B", "step", "shift", "scale", "zero")
GRADIENTS = ("exact", "bf16", "lowrank")


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
    stored_bits: int,
    scaling: float,
    bits: int,
    group_size: int,
    zero_point: str,
    scale_dtype: torch.dtype,
    k_quant: bool,
    fan_in_fan_out: bool,
    gradient: str,
) -> torch.Tensor:
    grid = Grid(bits, group_size, zero_point, scale_dtype, k_quant)  # type: ignore[arg-type]
    quantizer = Quantizer(A, B, step, shift, scale, zero, update_in_grid_units, stored_bits)
    return linear.forward(x, bias, weight, quantizer, grid, scaling, fan_in_fan_out)


@_fake_quantize_linear.register_fake
def _(x: torch.Tensor, bias: Any, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@torch.library.custom_op("peft_dlqat::fake_quantize_linear_backward", mutates_args=())
def _fake_quantize_linear_backward(
    grad: torch.Tensor,
    needs: list[bool],
    y: torch.Tensor | None,
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
    stored_bits: int,
    scaling: float,
    bits: int,
    group_size: int,
    zero_point: str,
    scale_dtype: torch.dtype,
    k_quant: bool,
    fan_in_fan_out: bool,
    gradient: str,
) -> list[torch.Tensor]:
    """The gradients that `needs` asks for, in the order of the arguments."""
    grid = Grid(bits, group_size, zero_point, scale_dtype, k_quant)  # type: ignore[arg-type]
    quantizer = Quantizer(A, B, step, shift, scale, zero, update_in_grid_units, stored_bits)
    wanted = {name for name, need in zip(_ARGUMENTS, needs, strict=True) if need}
    with torch.autocast(grad.device.type, enabled=False):
        grads = linear.backward(grad, wanted, y, x, bias, weight, quantizer, grid, scaling, fan_in_fan_out, gradient)
    return [grads[name] for name in _ARGUMENTS if name in wanted]


@_fake_quantize_linear_backward.register_fake
def _(grad: torch.Tensor, needs: list[bool], y: Any, *arguments: Any) -> list[torch.Tensor]:
    # Contiguous, as the real ones are, whatever the strides of the argument.
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(arguments, needs, strict=False) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    tensors, constants, gradient = inputs[: len(_ARGUMENTS)], inputs[len(_ARGUMENTS) :], inputs[-1]
    # The low-rank path has the magnitude's gradient from the output.
    keeps_output = gradient == "lowrank" and ctx.needs_input_grad[_ARGUMENTS.index("scale")]
    ctx.save_for_backward(output if keeps_output else None, *tensors)
    ctx.constants = constants


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[: len(_ARGUMENTS)]]
    found = iter(_fake_quantize_linear_backward(grad, needs, *ctx.saved_tensors, *ctx.constants))
    return (*(next(found) if need else None for need in needs), *(None for _ in ctx.constants))


_fake_quantize_linear.register_autograd(_backward, setup_context=_setup_context)


def fake_quantize_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    quantizer: Quantizer,
    grid: Grid,
    scaling: float,
    fan_in_fan_out: bool = False,
    gradient: str = "exact",
) -> torch.Tensor:
    """`F.linear(x, w_hat, bias)` with w_hat the quantized weight, differentiable by straight-through rounding.

    Differentiable in x, bias and all tensors of the quantizer, never in the frozen weight. The weight's arithmetic is
    float32; the product runs in the dtype of x. Between forward and backward only the arguments are kept.

    Args:
        x: input [..., in].
        bias: [out] in the dtype of x, or None.
        weight: W0 [out, in] ([in, out] with `fan_in_fan_out`), any floating dtype; or as [`store`] packed it.
        quantizer: the low-rank update, and the way into the grid and out of it.
        grid: the grid, with `grid.group_size * n_groups == in`.
        scaling: lora_alpha / r.
        fan_in_fan_out: whether the weight is stored transposed, as transformers' Conv1D does.
        gradient: "exact"; "bf16", where the product dy.T @ x that only feeds sums is computed in bfloat16; or
            "lowrank", at LoRA's own cost, see `lowrank`.

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
        quantizer.stored_bits,
        scaling,
        grid.bits,
        grid.group_size,
        grid.zero_point,
        grid.scale_dtype,
        grid.k_quant,
        fan_in_fan_out,
        gradient,
    )


__all__ = ["GRADIENTS", "compile_on_cpu", "fake_quantize_linear", "harden"]
