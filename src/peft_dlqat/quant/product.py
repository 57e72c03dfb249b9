"""The layer's product with the quantized weight, forward and backward, whoever computes the weight.

The weight is computed again in backward, so nothing of its size is kept from forward, and its gradient in pieces of
some rows, so that beside w_hat itself no temporary is of its size. `gradient="bf16"` only computes g = dL/dw_hat in
bfloat16, where a CPU is twice as fast: sums of it are all that is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..quant import lowrank
from .dispatch import implementation
from .fixed_point import as_rows
from .grid import Grid
from .quantizer import Quantizer, pieces

# Arguments whose gradients come from that of the weight.
_OF_WEIGHT = ("A", "B", "step", "shift", "scale", "zero")


def forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    quantizer: Quantizer,
    grid: Grid,
    scaling: float,
    fan_in_fan_out: bool,
) -> torch.Tensor:
    """y [..., out] from x [..., in]; the arguments are those of `fake_quantize_linear`."""
    w_hat = implementation(weight, quantizer, grid).quantized(
        weight, quantizer, grid, scaling, x.dtype, fan_in_fan_out
    )
    # The same call as the base layer's own forward, so that a merged layer gives the same bits.
    if fan_in_fan_out:
        flat = x.reshape(-1, x.shape[-1])
        product = flat @ w_hat.t().contiguous() if bias is None else torch.addmm(bias, flat, w_hat.t().contiguous())
        return product.view(*x.shape[:-1], w_hat.shape[0])
    return F.linear(x, w_hat, bias)


def backward(
    grad: torch.Tensor,
    needs: set[str],
    y: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    quantizer: Quantizer,
    grid: Grid,
    scaling: float,
    fan_in_fan_out: bool,
    gradient: str,
) -> dict[str, torch.Tensor]:
    """Gradients of the arguments that `needs` names; `grad` is dL/dy [..., out], `y` there for `lowrank`."""
    kernels = implementation(weight, quantizer, grid)
    grads: dict[str, torch.Tensor] = {}
    flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if "x" in needs:
        # w_hat has no name here, so that it is gone before the pieces of its gradient come.
        grads["x"] = (
            flat_grad @ kernels.quantized(weight, quantizer, grid, scaling, grad.dtype, fan_in_fan_out)
        ).view(x.shape)
    if "bias" in needs:
        grads["bias"] = flat_grad.sum(0)
    if gradient == "lowrank" and not needs & {"step", "shift"}:  # these move only while the grid is calibrated
        flat_y = None if y is None else y.reshape(-1, y.shape[-1])
        return grads | lowrank.weight_grads(flat_grad, needs, flat_x, flat_y, bias, quantizer, grid, scaling)
    wanted = {name for name in _OF_WEIGHT if name in needs}
    if wanted:
        if gradient == "bf16":
            flat_x, flat_grad = flat_x.bfloat16(), flat_grad.bfloat16()
        parts = [
            kernels.weight_grads(flat_grad[:, rows].t() @ flat_x, wanted, piece, own, grid, scaling)
            for rows, piece, own in pieces(as_rows(weight, fan_in_fan_out), quantizer)
        ]
        for name in wanted:
            own_parts = [part[name] for part in parts]
            grads[name] = torch.stack(own_parts).sum(0) if name == "A" else torch.cat(own_parts)
    return grads
