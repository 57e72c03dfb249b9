"""The weight's arithmetic in plain torch: the default, and what every kernel is compared with.

Forward, with W = W0 + scaling * BA in groups (see `quantizer`):

    w_hat = dequantize(quantize(W; step, rounding_zero); scale, zero)          y = x @ w_hat.T + bias

Backward. With g = dL/dw_hat = dy.T @ x [out, in], u = the code before rounding, `inside` = (qmin <= u <= qmax),
c = the code counted from its zero (code - z, or code) and S the shipped scale, straight-through rounding gives

    dL/dW     = g * inside * S / step
    dL/dA     = scaling * B.T @ dL/dW              dL/dB = scaling * dL/dW @ A.T
    dL/dstep  = -sum(g * inside * S / step * (u - z))                  with u for u - z where b is the zero
    dL/dscale = sum(g * c)
    dL/drounding_zero = sum(g * inside * S)        for z               -sum(g * inside * S / step)    for b
    dL/dzero  = -sum(g * S)                        for z               sum(g)                         for b

with each sum over a group. Where step and scale are one s, the two add up to LSQ's gradient (arXiv 1902.08153, eq. 3),
those of the two zeros to LSQ+'s (arXiv 2004.09576, eq. 6); where scale = m * s, m gets DL-QAT's. With the update in
units of the grid, dL/dA and dL/dB lack the division by step, and dL/dstep has W0's own share of u.

Rows have nothing to do with each other, but for adding up in dL/dA: everything can be had in pieces of some rows.
"""

from __future__ import annotations

import torch

from .fixed_point import as_rows
from .grid import Grid
from .quantizer import (
    Quantizer,
    compute_dtype,
    dequantize,
    in_steps,
    pieces,
    round_codes,
    shipped,
    shipped_zero,
    unrounded_codes,
)


def codes(weight: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Codes, int8 [out, in]; the weight has outputs as rows."""
    result = torch.empty(quantizer.shape, dtype=torch.int8, device=weight.device)
    for rows, piece, own in pieces(weight, quantizer):
        result[rows] = round_codes(unrounded_codes(piece, own), own.grid, in_place=True).flatten(-2)
    return result


@torch.no_grad()  # what is written in place of another tensor has no gradient
def quantized(
    weight: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype, fan_in_fan_out: bool = False
) -> torch.Tensor:
    """w_hat [out, in] in a dtype; with `fan_in_fan_out` the weight comes as [in, out]."""
    grid = quantizer.grid
    w_hat = torch.empty(quantizer.shape, dtype=dtype, device=weight.device)
    in_place = dtype == compute_dtype(weight)  # a new tensor costs more than what is computed
    for rows, piece, own in pieces(as_rows(weight, fan_in_fan_out), quantizer):
        unrounded = unrounded_codes(piece, own, out=w_hat[rows] if in_place else None)
        of_rows = dequantize(round_codes(unrounded, grid, in_place=True), *shipped(piece, own), grid, in_place=True)
        if not in_place:
            w_hat[rows] = of_rows
    return w_hat


def _inside(g: torch.Tensor, unrounded: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`g` where qmin <= unrounded <= qmax, and 0 elsewhere."""
    # One pass over memory. What lies on hardtanh's bounds is outside to it, so these are the next numbers beyond.
    eps = torch.finfo(unrounded.dtype).eps
    below, above = grid.qmin - 2 ** (grid.bits - 1) * eps, grid.qmax + 2 ** (grid.bits - 2) * eps
    return torch.ops.aten.hardtanh_backward(g, unrounded, below, above)


def weight_grads(
    g: torch.Tensor, wanted: set[str], weight: torch.Tensor, quantizer: Quantizer
) -> dict[str, torch.Tensor]:
    """From g = dL/dw_hat of some rows: the gradients of these rows' tensors, and their part of A's."""
    grid, scaling, step = quantizer.grid, quantizer.scaling, quantizer.step
    unrounded = unrounded_codes(weight, quantizer)
    codes = round_codes(unrounded, grid)
    scale, zero = shipped(weight, quantizer)
    g = grid.group(g.to(unrounded.dtype))
    integer = grid.zero_point == "integer"
    grads: dict[str, torch.Tensor] = {}
    if "scale" in wanted:
        counted = codes.sub_(zero.unsqueeze(-1)) if integer and zero is not None else codes
        grads["scale"] = counted.mul_(g).sum(-1)
    if "zero" in wanted:
        grads["zero"] = -scale * g.sum(-1) if integer else g.sum(-1)
    if not wanted & {"A", "B", "step", "rounding_zero"}:
        return grads

    g = _inside(g, unrounded, grid)
    rounding_zero = shipped_zero(quantizer.rounding_zero, grid)
    if "rounding_zero" in wanted:
        # Where the two zeros are one, nothing is clipped and S is step, this and dL/dzero add up to 0, exactly: Adam
        # would make full steps of what rounding leaves of it.
        grads["rounding_zero"] = g.sum(-1) * (scale if integer else -scale / step)
    if "step" in wanted:
        units = unrounded
        if quantizer.update_in_steps:
            units = in_steps(weight.to(unrounded.dtype), step, rounding_zero, grid)
        if integer and rounding_zero is not None:
            units = units - rounding_zero.unsqueeze(-1)
        grads["step"] = (units * g).sum(-1) * (-scale / step)
    if wanted & {"A", "B"}:
        A, B = quantizer.A, quantizer.B
        g = g.mul_((scale if quantizer.update_in_steps else scale / step).unsqueeze(-1)).flatten(-2)
        if "A" in wanted:
            grads["A"] = (scaling * (B.to(g.dtype).t() @ g)).to(A.dtype)
        if "B" in wanted:
            grads["B"] = (scaling * (g @ A.to(g.dtype).t())).to(B.dtype)
    return grads
