"""Who computes the weight: Triton's kernels on an NVIDIA GPU, else plain torch, compiled where that was asked for.

Training, merge and codes all ask here. Two implementations may round a latent weight on the edge between two codes to
either, so what one has trained the same one has to ship.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch

from ..quant import reference
from .grid import Grid
from .quantizer import QuantizedWeight, Quantizer, ship

_compiled: ModuleType | None = None


def compile_on_cpu(enabled: bool = True) -> None:
    """Have the op's arithmetic for CPUs compiled by torch.compile, in this process and from now on.

    For what it saves see docs/speed.md; codes and merged weights are the same to the bit. The first step takes some
    seconds more for each shape of layer. A C++ compiler is needed.

    Args:
        enabled: False goes back to plain torch.

    Raises:
        RuntimeError: if torch.compile finds no working C++ compiler.

    Example:
        ```py
        >>> import peft_dlqat
        >>> peft_dlqat.compile_on_cpu()
        ```
    """
    global _compiled
    if not enabled:
        _compiled = None
        return
    _check_compiler()
    from ..quant import compiled  # here: torch's compiler takes a second to import

    _compiled = compiled


@cache
def _check_compiler() -> None:
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(1))
    except Exception as error:
        raise RuntimeError(
            f"torch.compile does not work here ({error}): install a C++ compiler, or leave compile_on_cpu() out; "
            "plain torch computes the same."
        ) from error


def implementation(weight: torch.Tensor, quantizer: Quantizer, grid: Grid) -> ModuleType:
    """The module whose `codes`, `quantized` and `weight_grads` are for this weight; `reference` says what they do."""
    if weight.device.type == "cpu" and _compiled is not None:
        return _compiled
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
        from ..quant import nvidia as gpu
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}), so quantized weights are computed by plain torch, which needs more "
            "time and memory; pip install triton."
        )
        return None
    return gpu
