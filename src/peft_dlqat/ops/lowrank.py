"""Gradients at LoRA's own cost: no product of the weight's size but dL/dx.

With the clip's mask left out, and one magnitude m a row, dL/dW = m * dy.T @ x, and it never has to be made:

    dL/dA = scaling * ((m * dy) @ B).T @ x             dL/dB = scaling * m * (dy.T @ (x @ A.T))
    dL/dm = sum(dy * (y - bias)) / m                                        sums over tokens

The first two are not the gradients of what forward computes: weights beyond the grid's ends count as if they were
inside. The third is, but for the rounding of scales to `grid.scale_dtype`. The output y is kept for it.
"""

from __future__ import annotations

import torch

from ..grid import Grid
from ..qweight import Quantizer
from .dispatch import implementation


def backward(
    grad: torch.Tensor,
    needs: set[str],
    x: torch.Tensor,
    y: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    quantizer: Quantizer,
    grid: Grid,
    scaling: float,
    fan_in_fan_out: bool,
) -> dict[str, torch.Tensor]:
    """As `linear.backward`; `quantizer.scale / quantizer.step` must be the same for all groups of a row.

    The gradient of a row's m comes as one of its scales, shared out so that a common factor of them, and of nothing
    else, gets dL/dm.
    """
    grads: dict[str, torch.Tensor] = {}
    flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if "x" in needs:
        w_hat = implementation(weight, quantizer, grid).quantized(
            weight, quantizer, grid, scaling, grad.dtype, fan_in_fan_out
        )
        grads["x"] = (flat_grad @ w_hat).view_as(x)
    if "bias" in needs:
        grads["bias"] = flat_grad.sum(0)
    A, B = quantizer.A, quantizer.B
    magnitude = (quantizer.scale / quantizer.step)[:, 0]
    if "A" in needs:
        in_rank = flat_grad @ (scaling * magnitude.unsqueeze(1) * B).to(grad.dtype)
        grads["A"] = (in_rank.t() @ flat_x).to(A.dtype)
    if "B" in needs:
        in_rank = flat_x @ A.t().to(x.dtype)
        grads["B"] = (flat_grad.t() @ in_rank).to(B.dtype) * (scaling * magnitude.unsqueeze(1))
    if "scale" in needs:
        assert y is not None
        product = y.reshape(-1, y.shape[-1]) if bias is None else y.reshape(-1, y.shape[-1]) - bias
        total = (flat_grad * product).sum(0, dtype=quantizer.scale.dtype)
        grads["scale"] = total.unsqueeze(1) / (quantizer.scale * quantizer.scale.shape[1])
    if "zero" in needs:
        assert quantizer.zero is not None
        grads["zero"] = torch.zeros_like(quantizer.zero)
    return grads
