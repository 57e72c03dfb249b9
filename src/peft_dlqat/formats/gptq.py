"""GPTQ's format, version 1, for gptqmodel, vLLM and onnxruntime-genai's builder.

Codes [in, out] packed along in, float16 scales [n_groups, out], zero points less one packed along out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import IN_FLOAT16, Format, Outline, TensorInfo, per_group
from .bit_stream import bit_stream
from .engines import Engine, float32_logits
from .presets import Preset


def _gptqmodel(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from gptqmodel import BACKEND, GPTQModel

    # It loads all dense tensors in float16, which the scales are anyway; its torch kernel computes in the dtype of its
    # input.
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    return float32_logits(model.model.float(), ids)


class GPTQ(Format):
    """2, 3, 4 and 8 bits, symmetric or with an integer zero, with scales that fit float16."""

    name = "gptq"
    multiple = 32
    engines = (Engine("gptqmodel", "gptqmodel", _gptqmodel, 1e-9, largest_difference=1e-4, dense_dtype=torch.float16),)
    presets = tuple(
        Preset("gptqmodel", {"bits": bits, "zero_point": "none", "group_size": 128, "scale_dtype": "float16"})
        for bits in (2, 3, 4, 8)
    )
    usage = """\
```python
from gptqmodel import GPTQModel

model = GPTQModel.load("THIS_REPOSITORY")
```"""

    def holds(self, grid: Grid) -> bool:
        """As the class says."""
        return grid.bits in (2, 3, 4, 8) and grid.zero_point != "float" and grid.scale_dtype in IN_FLOAT16

    def stored_as(self, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
        """Symmetric grids have zero points too. g_idx is left out: 32 bits an input, over all outputs of the layer."""
        return f"gptq int{grid.bits}", grid.bits + per_group(grid, 16 + grid.bits)

    def weight_bytes(self, tensor: TensorInfo, grid: Grid, dtype: torch.dtype) -> float:
        """With g_idx."""
        return super().weight_bytes(tensor, grid, dtype) + 4 * tensor.out_in[1]

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """Always float16."""
        return torch.float16

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """As the module's docstring says; unsigned codes."""
        grid = weight.grid
        codes = weight.codes.to(torch.int16) - grid.qmin
        zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
        # Version 1 stores one less, and lets 0 wrap around.
        zeros = (zero.to(torch.int16) - grid.qmin - 1) % 2**grid.bits
        return {
            "qweight": bit_stream(codes, grid.bits).t().contiguous(),
            "qzeros": bit_stream(zeros.t(), grid.bits),
            "scales": weight.scale.t().to(self.scale_dtype(grid)),
            "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // grid.group_size,
        }

    def config(self, outline: Outline) -> dict[str, Any]:
        """The commonest settings, and by name the layers that have others or none."""
        packed = {tensor.module: (tensor.grid, tensor.out_in[1]) for tensor in outline.tensors if tensor.grid}
        every = {module: _settings(*found) for module, found in packed.items()}
        common = max(every.values(), key=lambda own: sum(own == other for other in every.values()))
        dynamic: dict[str, dict[str, Any]] = {
            f"+:^{re.escape(module)}$": own for module, own in every.items() if own != common
        }
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in outline.linears if name not in every}
        # gptqmodel refuses zero points in version 1 but for those of its own convention, which these follow: it looks
        # for its name among the producers.
        convention = [] if all(own["sym"] for own in every.values()) else ["gptqmodel:0.9.0"]
        section = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            **common,
            "desc_act": False,
            "lm_head": outline.head in every,
            "pack_dtype": "int32",
            "dynamic": dynamic,
            "meta": {"quantizer": ["peft-dlqat", *convention]},
        }
        return {"quantization_config": section}

    def json_files(self, outline: Outline) -> dict[str, dict[str, Any]]:
        """The section has a file of its own, too."""
        files = super().json_files(outline)
        return files | {"quantize_config.json": files["config.json"]["quantization_config"]}


def _settings(grid: Grid, in_features: int) -> dict[str, Any]:
    size = -1 if grid.group_size == in_features else grid.group_size
    return {"bits": grid.bits, "group_size": size, "sym": grid.zero_point == "none"}
