"""The weight's arithmetic in plain torch: the oracle for every faster kernel, and the default.

Forward, with W = W0 + scaling * BA in groups (see `qweight`):

    w_hat = dequantize(quantize(W; step, shift); scale, zero)          y = x @ w_hat.T + bias

Backward. With g = dL/dw_hat = dy.T @ x [out, in], u = the code before rounding, `inside` = (qmin <= u <= qmax),
c = the code counted from its zero (code - z, or code) and S the shipped scale, straight-through rounding gives

    dL/dW     = g * inside * S / step
    dL/dA     = scaling * B.T @ dL/dW              dL/dB = scaling * dL/dW @ A.T
    dL/dstep  = -sum(g * inside * S / step * (u - z))                  with u for u - z where b is the zero
    dL/dscale = sum(g * c)
    dL/dshift = sum(g * inside * S)                for z               -sum(g * inside * S / step)    for b
    dL/dzero  = -sum(g * S)                        for z               sum(g)                         for b

with each sum over a group. Where step and scale are one s, the two add up to LSQ's gradient (arXiv 1902.08153, eq. 3),
those of shift and zero to LSQ+'s (arXiv 2004.09576, eq. 6); where scale = m * s, m gets DL-QAT's. With the update in
units of the grid, dL/dA and dL/dB lack the division by step, and dL/dstep has W0's own share of u.

Rows have nothing to do with each other, but for adding up in dL/dA: everything can be had in pieces of some rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .fixed_point import as_rows
from .grid import Grid
from .quantizer import (
    Quantizer,
    compute_dtype,
    dequantize,
    in_grid_units,
    pieces,
    round_codes,
    ship,
    shipped_zero,
    unrounded_codes,
)


def codes(weight: torch.Tensor, quantizer: Quantizer, grid: Grid, scaling: float) -> torch.Tensor:
    """Codes, int8 [out, in]; the weight has outputs as rows."""
    result = torch.empty((quantizer.B.shape[0], quantizer.A.shape[1]), dtype=torch.int8, device=weight.device)
    for rows, piece, own in pieces(weight, quantizer):
        result[rows] = round_codes(unrounded_codes(piece, own, grid, scaling), grid, in_place=True).flatten(-2)
    return result


def quantized_rows(
    weight: torch.Tensor, quantizer: Quantizer, grid: Grid, scaling: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """w_hat of some rows, in `compute_dtype`, and in `out` if that is given."""
    codes = round_codes(unrounded_codes(weight, quantizer, grid, scaling, out), grid, in_place=True)
    return dequantize(codes, *ship(quantizer.scale, quantizer.zero, grid), grid, in_place=True)


@torch.no_grad()  # what is written in place of another tensor has no gradient
def quantized(
    weight: torch.Tensor,
    quantizer: Quantizer,
    grid: Grid,
    scaling: float,
    dtype: torch.dtype,
    fan_in_fan_out: bool = False,
    of_rows: Callable[[torch.Tensor, Quantizer, Grid, float], torch.Tensor] = quantized_rows,
) -> torch.Tensor:
    """w_hat [out, in]; `of_rows` computes a piece of it."""
    w_hat = torch.empty((quantizer.B.shape[0], quantizer.A.shape[1]), dtype=dtype, device=weight.device)
    # What torch.compile has made cannot write into a given tensor.
    in_place = of_rows is quantized_rows and dtype == compute_dtype(weight)
    for rows, piece, own in pieces(as_rows(weight, fan_in_fan_out), quantizer):
        if in_place:  # a new tensor costs more than what is computed
            quantized_rows(piece, own, grid, scaling, out=w_hat[rows])
        else:
            w_hat[rows] = of_rows(piece, own, grid, scaling)
    return w_hat


def _inside(g: torch.Tensor, unrounded: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`g` where qmin <= unrounded <= qmax, and 0 elsewhere."""
    # One pass over memory. What lies on hardtanh's bounds is outside to it, so these are the next numbers beyond.
    eps = torch.finfo(unrounded.dtype).eps
    below, above = grid.qmin - 2 ** (grid.bits - 1) * eps, grid.qmax + 2 ** (grid.bits - 2) * eps
    return torch.ops.aten.hardtanh_backward(g, unrounded, below, above)


def weight_grads(
    g: torch.Tensor, wanted: set[str], weight: torch.Tensor, quantizer: Quantizer, grid: Grid, scaling: float
) -> dict[str, torch.Tensor]:
    """From g = dL/dw_hat of some rows: the gradients of these rows' tensors, and their part of A's."""
    unrounded = unrounded_codes(weight, quantizer, grid, scaling)
    codes = round_codes(unrounded, grid)
    scale, zero = ship(quantizer.scale, quantizer.zero, grid)
    g = grid.group(g.to(unrounded.dtype))
    integer = grid.zero_point == "integer"
    grads: dict[str, torch.Tensor] = {}
    if "scale" in wanted:
        counted = codes.sub_(zero.unsqueeze(-1)) if integer and zero is not None else codes
        grads["scale"] = counted.mul_(g).sum(-1)
    if "zero" in wanted:
        grads["zero"] = -scale * g.sum(-1) if integer else g.sum(-1)
    if not wanted & {"A", "B", "step", "shift"}:
        return grads

    g = _inside(g, unrounded, grid)
    step, shift = quantizer.step, shipped_zero(quantizer.shift, grid)
    if "shift" in wanted:
        # Where shift and zero are one, nothing is clipped and S is step, this and dL/dzero add up to 0, exactly: Adam
        # would make full steps of what rounding leaves of it.
        grads["shift"] = g.sum(-1) * (scale if integer else -scale / step)
    if "step" in wanted:
        in_units = unrounded
        if quantizer.update_in_grid_units:
            in_units = in_grid_units(weight.to(unrounded.dtype), step, shift, grid)
        if integer and shift is not None:
            in_units = in_units - shift.unsqueeze(-1)
        grads["step"] = (in_units * g).sum(-1) * (-scale / step)
    if wanted & {"A", "B"}:
        A, B = quantizer.A, quantizer.B
        g = g.mul_((scale if quantizer.update_in_grid_units else scale / step).unsqueeze(-1)).flatten(-2)
        if "A" in wanted:
            grads["A"] = (scaling * (B.to(g.dtype).t() @ g)).to(A.dtype)
        if "B" in wanted:
            grads["B"] = (scaling * (g @ A.to(g.dtype).t())).to(B.dtype)
    return grads
