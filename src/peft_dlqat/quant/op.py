"""The two differentiable ops of the package: the quantized weight, and the layer's product with it.

`fake_quantize` takes the frozen weight and a `Quantizer`, and returns w_hat: for whoever computes with a weight in a
way of his own. `fake_quantize_linear` returns the output of a linear layer. It computes the weight again in backward,
so nothing of its size is kept from forward; and the weight's gradient comes in pieces of some rows, so that beside
w_hat itself no temporary is of its size.

In eager mode both are plain `torch.autograd.Function`s. For `torch.compile` the product is a custom op of the same
functions, opaque to it: no graph break, and the same bits compiled or not. The weight alone is a graph break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import lowrank
from .dispatch import implementation
from .fixed_point import as_rows
from .grid import Grid
from .quantizer import Quantizer, pieces

# What the op can be differentiated in, in the order of its arguments.
_TENSORS = ("x", "bias", "weight", "A", "B", "step", "rounding_zero", "scale", "zero")
_OF_WEIGHT = _TENSORS[3:]  # whose gradients come from that of w_hat
_OF_QUANTIZER = _TENSORS[2:]
GRADIENTS = ("exact", "bf16", "lowrank")
# Of layers that gradient checkpointing has just computed again, by what they are made of, until their own backward.
_recomputed: dict[tuple[Any, ...], torch.Tensor] = {}
MOST_RECOMPUTED = 2**31
"""Bytes of them at most: a checkpoint is of one decoder layer, as a rule, but may be of the whole model."""


def fake_quantize_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    quantizer: Quantizer,
    fan_in_fan_out: bool = False,
    gradient: str = "exact",
) -> torch.Tensor:
    """`F.linear(x, w_hat, bias)` with w_hat the quantized weight, differentiable by straight-through rounding.

    Differentiable once, in x, bias and all tensors of the quantizer, never in the frozen weight. The weight's
    arithmetic is float32; the product runs in the dtype of x. Between forward and backward only the arguments are
    kept.

    Args:
        x: input [..., in].
        bias: [out] in the dtype of x, or None.
        weight: W0 [out, in] ([in, out] with `fan_in_fan_out`), any floating dtype; or as [`store`] packed it.
        quantizer: the low-rank update, and the way into the grid and out of it.
        fan_in_fan_out: whether the weight is stored transposed, as transformers' Conv1D does.
        gradient: "exact"; "bf16", where the product dy.T @ x that only feeds sums is computed in bfloat16, in which a
            CPU is twice as fast; or "lowrank", at LoRA's own cost, see `lowrank`.

    Returns:
        y [..., out], in the dtype of x.
    """
    grid, q = quantizer.grid, quantizer
    tensors = (x, bias, weight, q.A, q.B, q.step, q.rounding_zero, q.scale, q.zero)
    if torch.compiler.is_compiling():
        numbers = (grid.bits, grid.group_size, grid.zero_point, grid.scale_dtype, grid.k_quant)
        constants = (*numbers, q.scaling, q.update_in_steps, q.storage, fan_in_fan_out, gradient)
        return _compiled_forward(*tensors, *constants)
    if not torch.is_grad_enabled():
        return _forward(x, bias, weight, quantizer, fan_in_fan_out)
    return _FakeQuantizeLinear.apply(*tensors, quantizer, fan_in_fan_out, gradient)


@torch.compiler.disable
def fake_quantize(
    weight: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype, fan_in_fan_out: bool = False
) -> torch.Tensor:
    """w_hat, the quantized weight, differentiable once, in all tensors of the quantizer.

    Args:
        weight: as `fake_quantize_linear` takes it.
        quantizer: as `fake_quantize_linear` takes it.
        dtype: of the result.
        fan_in_fan_out: as `fake_quantize_linear` takes it.

    Returns:
        [out, in] ([in, out] with `fan_in_fan_out`), the very numbers that `fake_quantize_linear` multiplies with.
    """
    q = quantizer
    tensors = (weight, q.A, q.B, q.step, q.rounding_zero, q.scale, q.zero)
    return _FakeQuantize.apply(*tensors, quantizer, dtype, fan_in_fan_out)


def _forward(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, quantizer: Quantizer, fan_in_fan_out: bool
) -> torch.Tensor:
    return linear(x, bias, quantized(weight, quantizer, x.dtype, fan_in_fan_out), fan_in_fan_out)


def quantized(weight: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype, fan_in_fan_out: bool) -> torch.Tensor:
    """w_hat [out, in] without a gradient; arguments as `fake_quantize`."""
    return implementation(weight, quantizer).quantized(weight, quantizer, dtype, fan_in_fan_out)


def linear(x: torch.Tensor, bias: torch.Tensor | None, w_hat: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """`F.linear(x, w_hat, bias)` by the call of the base layer's own forward: a merged layer gives the same bits."""
    if fan_in_fan_out:
        flat = x.reshape(-1, x.shape[-1])
        product = flat @ w_hat.t().contiguous() if bias is None else torch.addmm(bias, flat, w_hat.t().contiguous())
        return product.view(*x.shape[:-1], w_hat.shape[0])
    return F.linear(x, w_hat, bias)


def _backward(
    grad: torch.Tensor,
    wanted: set[str],
    y: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    quantizer: Quantizer,
    fan_in_fan_out: bool,
    gradient: str,
) -> dict[str, torch.Tensor]:
    """Gradients of the tensors that `wanted` names; `grad` is dL/dy [..., out], `y` there for `lowrank`."""
    grads: dict[str, torch.Tensor] = {}
    flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if "x" in wanted:
        # w_hat has no name here, so that it is gone before the pieces of its gradient come.
        grads["x"] = (flat_grad @ _once_more(weight, quantizer, grad.dtype, fan_in_fan_out)).view(x.shape)
    if "bias" in wanted:
        grads["bias"] = flat_grad.sum(0)
    of_weight = {name for name in _OF_WEIGHT if name in wanted}
    if gradient == "lowrank" and not wanted & {"step", "rounding_zero"}:  # which move only in calibration
        flat_y = None if y is None else y.reshape(-1, y.shape[-1])
        return grads | lowrank.weight_grads(flat_grad, of_weight, flat_x, flat_y, bias, quantizer)
    if gradient == "bf16":
        flat_x, flat_grad = flat_x.bfloat16(), flat_grad.bfloat16()
    return grads | _weight_grads(
        lambda rows: _sum_over_tokens(flat_grad[:, rows], flat_x), of_weight, weight, quantizer, fan_in_fan_out
    )


def _sum_over_tokens(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dL/dw_hat [rows, in] from dL/dy [tokens, rows] and x [tokens, in].

    Of float16 it is float32: under loss scaling the sum may be beyond 65504, where LoRA's own gradients are not.
    """
    if grad.dtype != torch.float16:
        return grad.t() @ x
    if grad.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # from torch 2.8 on, on CUDA only
        return torch.ops.aten.mm.dtype(grad.t(), x, torch.float32)
    return grad.t().float() @ x.float()


def _weight_grads(
    g: Callable[[slice], torch.Tensor],
    wanted: set[str],
    weight: torch.Tensor,
    quantizer: Quantizer,
    fan_in_fan_out: bool,
) -> dict[str, torch.Tensor]:
    """What dL/dw_hat makes of the tensors that `wanted` names; `g` makes a tensor [rows, in] of some rows of it."""
    if not wanted:
        return {}
    kernels = implementation(weight, quantizer)
    parts = [
        kernels.weight_grads(g(rows), wanted, piece, own)
        for rows, piece, own in pieces(as_rows(weight, fan_in_fan_out), quantizer)
    ]
    if len(parts) == 1:
        return parts[0]
    grads = {name: [part[name] for part in parts] for name in wanted}
    return {name: torch.stack(own).sum(0) if name == "A" else torch.cat(own) for name, own in grads.items()}


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # under create_graph=True
        raise RuntimeError(
            "second derivatives through a quantized layer are not computed (create_graph=True); merge the adapter "
            "or disable it for a penalty on gradients."
        )


def _keep_settings(ctx: Any, quantizer: Quantizer) -> None:
    """Not the quantizer itself: its tensors are kept as autograd keeps them, or they would outlive a checkpoint."""
    ctx.before = quantizer.grid, quantizer.scaling
    ctx.after = quantizer.update_in_steps, quantizer.storage


def _kept_quantizer(ctx: Any, tensors: list[torch.Tensor]) -> Quantizer:
    return Quantizer(*ctx.before, *tensors, *ctx.after)


def _keeps_output(ctx: Any, gradient: str) -> bool:
    """The low-rank path has the magnitude's gradient from the output."""
    return gradient == "lowrank" and ctx.needs_input_grad[_TENSORS.index("scale")]


def _made_of(weight: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype) -> tuple[Any, ...]:
    """What tells one w_hat from all others that are there during a backward pass."""
    tensors = (weight, *(getattr(quantizer, name) for name in _OF_WEIGHT))
    return dtype, *(tensor if tensor is None else (tensor.data_ptr(), tensor._version) for tensor in tensors)


def _once_more(weight: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype, fan_in_fan_out: bool) -> torch.Tensor:
    """w_hat for backward: as checkpointing has just made it, or made again."""
    kept = _recomputed.pop(_made_of(weight, quantizer, dtype), None) if _recomputed else None
    return quantized(weight, quantizer, dtype, fan_in_fan_out) if kept is None else kept


def _has_room(w_hat: torch.Tensor) -> bool:
    return sum(kept.nbytes for kept in _recomputed.values()) + w_hat.nbytes <= MOST_RECOMPUTED


def _keep_if_recomputed(ctx: Any, weight: torch.Tensor, quantizer: Quantizer, w_hat: torch.Tensor) -> None:
    """Keep w_hat where this is checkpointing's second forward pass: the layer's backward comes before anything moves.

    Should it not come, any other forward pass lets w_hat go.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass is running
        _recomputed.clear()
    elif ctx.needs_input_grad[_TENSORS.index("x")] and _has_room(w_hat):
        _recomputed[_made_of(weight, quantizer, w_hat.dtype)] = w_hat


class _FakeQuantizeLinear(torch.autograd.Function):
    """The op in eager mode; the quantizer's tensors stand before it too, for autograd to see them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        tensors, (quantizer, fan_in_fan_out, gradient) = arguments[: len(_TENSORS)], arguments[len(_TENSORS) :]
        x, bias, weight = tensors[:3]
        w_hat = quantized(weight, quantizer, x.dtype, fan_in_fan_out)
        output = linear(x, bias, w_hat, fan_in_fan_out)
        _keep_if_recomputed(ctx, weight, quantizer, w_hat)
        # A view that is made in here could not be changed in place, as models do.
        output = torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output
        ctx.save_for_backward(output if _keeps_output(ctx, gradient) else None, *tensors)
        _keep_settings(ctx, quantizer)
        ctx.constants = fan_in_fan_out, gradient
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        _refuse_second_derivatives()
        y, x, bias, weight, *of_weight = ctx.saved_tensors
        quantizer = _kept_quantizer(ctx, of_weight)
        wanted = {name for name, need in zip(_TENSORS, ctx.needs_input_grad, strict=False) if need}
        with torch.autocast(grad.device.type, enabled=False):
            grads = _backward(grad, wanted, y, x, bias, weight, quantizer, *ctx.constants)
        return (*map(grads.get, _TENSORS), None, None, None)


class _FakeQuantize(torch.autograd.Function):
    """The weight alone, as `_FakeQuantizeLinear` has it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        tensors, (quantizer, dtype, fan_in_fan_out) = arguments[: len(_OF_QUANTIZER)], arguments[len(_OF_QUANTIZER) :]
        weight = tensors[0]
        w_hat = implementation(weight, quantizer).quantized(weight, quantizer, dtype, fan_in_fan_out)
        ctx.save_for_backward(*tensors)
        _keep_settings(ctx, quantizer)
        ctx.fan_in_fan_out = fan_in_fan_out
        return w_hat.t() if fan_in_fan_out else w_hat

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        _refuse_second_derivatives()
        weight, *of_weight = ctx.saved_tensors
        quantizer = _kept_quantizer(ctx, of_weight)
        wanted = {name for name, need in zip(_OF_QUANTIZER, ctx.needs_input_grad, strict=False) if need}
        g = grad.t() if ctx.fan_in_fan_out else grad
        with torch.autocast(grad.device.type, enabled=False):
            # Kernels write into what they are given, and this gradient may be somebody else's too.
            grads = _weight_grads(lambda rows: g[rows].clone(), wanted, weight, quantizer, ctx.fan_in_fan_out)
        return (*map(grads.get, _OF_QUANTIZER), None, None, None)


@torch.library.custom_op("peft_dlqat::fake_quantize_linear", mutates_args=())
def _compiled_forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    step: torch.Tensor,
    rounding_zero: torch.Tensor | None,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_point: str,
    scale_dtype: torch.dtype,
    k_quant: bool,
    scaling: float,
    update_in_steps: bool,
    storage: str,
    fan_in_fan_out: bool,
    gradient: str,
) -> torch.Tensor:
    grid = Grid(bits, group_size, zero_point, scale_dtype, k_quant)  # type: ignore[arg-type]
    quantizer = Quantizer(grid, scaling, A, B, step, rounding_zero, scale, zero, update_in_steps, storage)
    return _forward(x, bias, weight, quantizer, fan_in_fan_out)


@_compiled_forward.register_fake
def _(x: torch.Tensor, bias: Any, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@torch.library.custom_op("peft_dlqat::fake_quantize_linear_backward", mutates_args=())
def _compiled_backward(
    grad: torch.Tensor,
    needs: list[bool],
    y: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    step: torch.Tensor,
    rounding_zero: torch.Tensor | None,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_point: str,
    scale_dtype: torch.dtype,
    k_quant: bool,
    scaling: float,
    update_in_steps: bool,
    storage: str,
    fan_in_fan_out: bool,
    gradient: str,
) -> list[torch.Tensor]:
    """The gradients that `needs` asks for, in the order of the arguments."""
    grid = Grid(bits, group_size, zero_point, scale_dtype, k_quant)  # type: ignore[arg-type]
    quantizer = Quantizer(grid, scaling, A, B, step, rounding_zero, scale, zero, update_in_steps, storage)
    wanted = {name for name, need in zip(_TENSORS, needs, strict=True) if need}
    with torch.autocast(grad.device.type, enabled=False):
        grads = _backward(grad, wanted, y, x, bias, weight, quantizer, fan_in_fan_out, gradient)
    # Two results of a custom op must not be parts of one tensor.
    return [grads[name].clone() if grads[name]._is_view() else grads[name] for name in _TENSORS if name in wanted]


@_compiled_backward.register_fake
def _(grad: torch.Tensor, needs: list[bool], y: Any, *arguments: Any) -> list[torch.Tensor]:
    # Contiguous, as the real ones are, whatever the strides of the argument.
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(arguments, needs, strict=False) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output if _keeps_output(ctx, inputs[-1]) else None, *inputs[: len(_TENSORS)])
    ctx.constants = inputs[len(_TENSORS) :]


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[: len(_TENSORS)]]
    found = iter(_compiled_backward(grad, needs, *ctx.saved_tensors, *ctx.constants))
    return (*(next(found) if need else None for need in needs), *(None for _ in ctx.constants))


_compiled_forward.register_autograd(_autograd, setup_context=_setup_context)
