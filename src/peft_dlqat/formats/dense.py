"""Merged weights in one dtype, for any engine; exact in float32, each weight rounded once in 16 bits."""

from __future__ import annotations

import torch

from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import Format, TensorInfo
from .engines import TRANSFORMERS


class Dense(Format):
    """Every grid."""

    name = "dense"
    packs_conv1d = True
    remark = "  (16 bits round each weight once)"
    engines = (TRANSFORMERS,)
    usage = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")
```"""

    def holds(self, grid: Grid) -> bool:
        """Always; that a 16-bit dtype rounds the products is the choice of `dtype`."""
        return True

    def stored_as(self, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
        """In the dtype of all tensors."""
        return str(dtype).removeprefix("torch."), float(torch.finfo(dtype).bits)

    def advice(self, grid: Grid, in_features: int | None = None) -> str:
        """None: the merged weight is what is wanted."""
        return ""

    def fit(self, tensor: TensorInfo, weight: QuantizedWeight, grid: Grid) -> torch.Tensor:
        """The merged weight."""
        return tensor.dense(super().fit(tensor, weight, grid))
