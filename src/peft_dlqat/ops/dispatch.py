"""Who computes the weight: Triton's kernels on an NVIDIA GPU, else plain torch.

Training, merge and codes all ask here. Two implementations may round a latent weight on the edge between two codes to
either, so what one has trained the same one has to ship.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch

from ..grid import Grid
from ..qweight import QuantizedWeight, Quantizer, ship
from . import reference


def implementation(weight: torch.Tensor, quantizer: Quantizer, grid: Grid) -> ModuleType:
    """The module whose `codes`, `quantized` and `weight_grads` are for this weight; `reference` says what they do."""
    gpu = _gpu() if _on_nvidia(weight) else None
    return gpu if gpu is not None and gpu.supports(weight, quantizer, grid) else reference


def harden(weight: torch.Tensor, quantizer: Quantizer, grid: Grid, scaling: float) -> QuantizedWeight:
    """Turn the latent weight into codes for good; arguments as `unrounded_codes`."""
    codes = implementation(weight, quantizer, grid).codes(weight, quantizer, grid, scaling)
    return QuantizedWeight(codes, *ship(quantizer.scale, quantizer.zero, grid), grid)


def _on_nvidia(weight: torch.Tensor) -> bool:
    # AMD's GPUs are "cuda" to torch, too; the kernels have not been tried there.
    return weight.device.type == "cuda" and torch.version.cuda is not None


@cache
def _gpu() -> ModuleType | None:
    try:
        from . import gpu
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}), so quantized weights are computed by plain torch, which needs more "
            "time and memory; pip install triton."
        )
        return None
    return gpu
