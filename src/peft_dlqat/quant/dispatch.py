"""Who computes the weight: Triton's kernels on an NVIDIA GPU, else plain torch.

Training, merge and codes all ask here. Two implementations may round a latent weight on the edge between two codes to
either, so what one has trained the same one has to ship: it is chosen once per process.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch

from . import reference
from .in_file import file_storage
from .quantizer import QuantizedWeight, Quantizer, pieces, shipped


def implementation(weight: torch.Tensor, quantizer: Quantizer) -> ModuleType:
    """The module whose `codes`, `quantized` and `weight_grads` are for this weight; `reference` says what they do."""
    nvidia = _nvidia(weight.device.type) if _on_nvidia(weight) else None
    return nvidia if nvidia is not None and nvidia.supports(weight, quantizer) else reference


def harden(weight: torch.Tensor, quantizer: Quantizer) -> QuantizedWeight:
    """Turn the latent weight into codes for good; arguments as `unrounded_codes`."""
    codes = implementation(weight, quantizer).codes(weight, quantizer)
    blocks = None
    if (in_file := file_storage(quantizer.storage)) is not None:
        found = pieces(weight, quantizer)
        blocks = torch.cat([in_file.write(own, codes[rows], of.scale, of.zero, of.grid) for rows, own, of in found])
    return QuantizedWeight(codes, *shipped(weight, quantizer), quantizer.grid, blocks)


def _on_nvidia(weight: torch.Tensor) -> bool:
    # AMD's GPUs are "cuda" to torch, too; the kernels have not been tried there.
    return weight.device.type == "cuda" and torch.version.cuda is not None


@cache
def _nvidia(device: str) -> ModuleType | None:
    try:
        from . import nvidia

        nvidia.probe(device)
    except Exception as error:  # Triton's own, its compiler's, the linker's, the driver's
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        warnings.warn(
            f"Triton's kernels do not run here ({type(error).__name__}: {reason}), so quantized weights are computed "
            "by plain torch, which needs more time and memory. They need pip install triton, a C compiler, Python's "
            "headers (python3-dev) and a card of compute capability 8.0 or more."
        )
        return None
    return nvidia
