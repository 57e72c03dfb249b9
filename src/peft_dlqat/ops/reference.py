"""The fused op in plain torch: the oracle for every faster kernel, and the default.

Forward, with W = W0 + scaling * BA in groups (see `qweight`):

    w_hat = dequantize(quantize(W))          y = x @ w_hat.T + bias

Backward. With g = dL/dw_hat = dy.T @ x [out, in], `inside` = (qmin <= unrounded code <= qmax), c = the code counted
from its zero (code - z, or code) and t = the same before rounding, straight-through rounding gives

    dL/dW = g * inside * S / s
    dL/dA = scaling * B.T @ dL/dW            dL/dB = scaling * dL/dW @ A.T
    dL/dm = sum(g * (s * c + b))                                (DL-QAT's magnitude)
    dL/ds = sum(g * (m * c - S / s * inside * t))               (LSQ, arXiv 1902.08153, eq. 3)
    dL/dz = sum(g * S * (inside - 1))                           (LSQ+, arXiv 2004.09576, eq. 6, in units of codes)
    dL/db = sum(g * (m - S / s * inside))

with each sum over a group. The weight is computed again in backward, so nothing of its size is kept from forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..grid import Grid
from ..qweight import dequantize, fold, latent_weight, round_codes, shipped_zero, unrounded_codes


def forward(
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
    fan_in_fan_out: bool,
) -> torch.Tensor:
    """y [..., out] from x [..., in]; the arguments are those of `fake_quantize_linear`."""
    zero = shipped_zero(zero, grid)
    latent = latent_weight(weight.t() if fan_in_fan_out else weight, A, B, scaling)
    codes = round_codes(unrounded_codes(latent, scale, zero, grid), grid)
    w_hat = dequantize(codes, *fold(scale, zero, magnitude, grid), grid).to(x.dtype)
    # The same call as the base layer's own forward, so that a merged layer gives the same bits.
    if fan_in_fan_out:
        flat = x.reshape(-1, x.shape[-1])
        product = flat @ w_hat.t().contiguous() if bias is None else torch.addmm(bias, flat, w_hat.t().contiguous())
        return product.view(*x.shape[:-1], w_hat.shape[0])
    return F.linear(x, w_hat, bias)


def backward(
    grad: torch.Tensor,
    needs: dict[str, bool],
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    magnitude: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Grid,
    scaling: float,
    fan_in_fan_out: bool,
) -> dict[str, torch.Tensor | None]:
    """Gradients by argument name for those that `needs` asks for; `grad` is dL/dy [..., out]."""
    zero = shipped_zero(zero, grid)
    latent = latent_weight(weight.t() if fan_in_fan_out else weight, A, B, scaling)
    unrounded = unrounded_codes(latent, scale, zero, grid)
    codes = round_codes(unrounded, grid)
    folded_scale, folded_zero = fold(scale, zero, magnitude, grid)
    grads: dict[str, torch.Tensor | None] = {}

    flat_grad = grad.reshape(-1, grad.shape[-1])
    if needs["x"]:
        w_hat = dequantize(codes, folded_scale, folded_zero, grid).to(grad.dtype)
        grads["x"] = (flat_grad @ w_hat).view_as(x)
    if needs["bias"]:
        grads["bias"] = flat_grad.sum(0)
    if not any(needs[name] for name in ("A", "B", "magnitude", "scale", "zero")):
        return grads

    g = grid.group((flat_grad.t() @ x.reshape(-1, x.shape[-1])).to(latent.dtype))
    inside = (unrounded >= grid.qmin) & (unrounded <= grid.qmax)
    integer_zero = zero.unsqueeze(-1) if zero is not None and grid.zero_point == "integer" else None
    if needs["magnitude"] or needs["scale"]:
        code_sum = (g * (codes if integer_zero is None else codes - integer_zero)).sum(-1)
    if needs["magnitude"]:
        offset_grad = 0 if zero is None or grid.zero_point == "integer" else zero * g.sum(-1)
        grads["magnitude"] = scale * code_sum + offset_grad
    g_inside = g * inside
    ratio = folded_scale / scale
    if needs["scale"]:
        from_zero = unrounded if integer_zero is None else unrounded - integer_zero
        grads["scale"] = magnitude * code_sum - ratio * (g_inside * from_zero).sum(-1)
    if needs["zero"]:
        if grid.zero_point == "float":
            grads["zero"] = magnitude * g.sum(-1) - ratio * g_inside.sum(-1)
        else:
            grads["zero"] = folded_scale * (g_inside - g).sum(-1)
    if needs["A"] or needs["B"]:
        g_latent = (g_inside * ratio.unsqueeze(-1)).flatten(-2)
        if needs["A"]:
            grads["A"] = (scaling * (B.to(g_latent.dtype).t() @ g_latent)).to(A.dtype)
        if needs["B"]:
            grads["B"] = (scaling * (g_latent @ A.to(g_latent.dtype).t())).to(B.dtype)
    return grads
