"""Gradients at LoRA's own cost: no product of the weight's size but dL/dx.

With the clip's mask left out, and one magnitude m a row, dL/dW = m * dy.T @ x, and it never has to be made:

    dL/dA = scaling * ((m * dy) @ B).T @ x             dL/dB = scaling * m * (dy.T @ (x @ A.T))
    dL/db = dy.T @ X                                   X [tokens, n_groups]: the inputs, summed over each group
    dL/dm = (sum(dy * (y - bias)) - sum(b * dL/db)) / m                     over tokens, and over a row's groups

The first two are not the gradients of what forward computes: weights beyond the grid's ends count as if they were
inside. The others are, but for the rounding of scales to `grid.scale_dtype`; b stands for an offset, and m for the
scale's alone. The output y is kept for it.
"""

from __future__ import annotations

import torch

from .quantizer import Quantizer


def weight_grads(
    grad: torch.Tensor,
    needs: set[str],
    x: torch.Tensor,
    y: torch.Tensor | None,
    bias: torch.Tensor | None,
    quantizer: Quantizer,
) -> dict[str, torch.Tensor]:
    """Gradients of the quantizer's tensors that `needs` names; x [tokens, in], y and `grad` = dL/dy [tokens, out].

    `quantizer.scale / quantizer.step` must be the same for all groups of a row. The gradient of a row's m comes as one
    of its scales, shared out so that a common factor of them, and of nothing else, gets dL/dm.
    """
    grads: dict[str, torch.Tensor] = {}
    A, B, grid, scaling = quantizer.A, quantizer.B, quantizer.grid, quantizer.scaling
    magnitude = (quantizer.scale / quantizer.step)[:, 0]
    if "A" in needs:
        in_rank = grad @ (scaling * magnitude.unsqueeze(1) * B).to(grad.dtype)
        grads["A"] = (in_rank.t() @ x).to(A.dtype)
    if "B" in needs:
        in_rank = x @ A.t().to(x.dtype)
        grads["B"] = (grad.t() @ in_rank).to(B.dtype) * (scaling * magnitude.unsqueeze(1))
    of_offset = None
    if "zero" in needs or ("scale" in needs and grid.zero_point == "float"):
        of_offset = (grad.t() @ x.unflatten(-1, (-1, grid.group_size)).sum(-1)).to(quantizer.scale.dtype)
    if "scale" in needs:
        assert y is not None
        product = y if bias is None else y - bias
        total = (grad * product).sum(0, dtype=quantizer.scale.dtype).unsqueeze(1)
        if of_offset is not None and quantizer.zero is not None and grid.zero_point == "float":
            total = total - (quantizer.zero * of_offset).sum(1, keepdim=True)
        share = total / (quantizer.scale * quantizer.scale.shape[1])
        grads["scale"] = torch.where(quantizer.scale == 0, 0, share)  # of m = 0 the output says nothing
    if "zero" in needs:
        assert of_offset is not None
        grads["zero"] = of_offset if grid.zero_point == "float" else -quantizer.scale * of_offset
    return grads
