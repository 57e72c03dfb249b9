"""compressed-tensors' `pack-quantized`, for transformers and vLLM.

Codes in int32 words along in, scales [out, n_groups], zero points packed along out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import Add, Format, Outline, per_group
from .engines import TRANSFORMERS
from .presets import Preset


class CompressedTensors(Format):
    """2, 3, 4 and 8 bits, symmetric or with an integer zero, any group size."""

    name = "compressed-tensors"
    package = "compressed-tensors"
    minimum = "0.18"  # from which on 3 bits are packed without gaps; what 0.17 writes is another model to it
    extra = "compressed-tensors"
    engines = (TRANSFORMERS,)
    # Without zeros: vLLM's kernel for 2 and 3 bits has none, and grids that differ can stand side by side.
    presets = tuple(
        Preset(engine, {"bits": bits, "zero_point": "none", "group_size": 128})
        for engine in ("vllm", "transformers")
        for bits in (2, 3, 4, 8)
    )
    usage = """\
```python
from transformers import AutoModelForCausalLM  # and pip install compressed-tensors

model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")
```

or `vllm serve THIS_REPOSITORY`."""

    def holds(self, grid: Grid) -> bool:
        """As the class says."""
        return grid.bits in (2, 3, 4, 8) and grid.zero_point != "float"

    def stored_as(self, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
        """Codes, scales and zero points, nothing padded."""
        zero_bits = grid.bits if grid.zero_point == "integer" else 0
        shared = torch.finfo(self.scale_dtype(grid)).bits + zero_bits
        return f"pack-quantized int{grid.bits}", grid.bits + per_group(grid, shared)

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """Beside zero points float32: transformers' loader multiplies in the dtype of the scale, and then rounds."""
        return torch.float32 if grid.zero_point == "integer" else grid.scale_dtype

    def grids(self, outline: Outline) -> dict[str, Grid]:
        """Their own; but transformers loads zero points of one kind of grid only, so the widest and finest for all."""
        own = outline.adapted
        if not _mixed(outline):
            return own
        size = math.gcd(*(grid.group_size for grid in own.values()))
        bits = max(grid.bits for grid in own.values())
        return dict.fromkeys(own, Grid(bits, size, "integer", next(iter(own.values())).scale_dtype))

    def advice_for(self, outline: Outline) -> str:
        """Of grids that differ, what keeps each of them."""
        return "zero_point='none' keeps each layer's own grid" if _mixed(outline) else super().advice_for(outline)

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """By the library's own packing."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        bits = weight.grid.bits
        found = {
            "weight_packed": pack_to_int32(weight.codes, bits),
            "weight_scale": weight.scale.to(self.scale_dtype(weight.grid)),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if weight.zero is not None:
            found["weight_zero_point"] = pack_to_int32(weight.zero.to(torch.int8), bits, packed_dim=0)
        return found

    def config(self, outline: Outline) -> dict[str, Any]:
        """One config group a kind of grid."""
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )

        kinds: dict[tuple[int, int, bool], list[str]] = {}
        for name, grid in (self.grids(outline) if _mixed(outline) else _by_row(outline)).items():
            kind = grid.bits, grid.group_size, grid.zero_point == "none"
            kinds.setdefault(kind, []).append(name.removesuffix(".weight"))
        groups = {}
        for index, ((bits, group_size, symmetric), modules) in enumerate(kinds.items()):
            args = QuantizationArgs(
                num_bits=bits,
                type="int",
                symmetric=symmetric,
                strategy="channel" if group_size == -1 else "group",
                group_size=None if group_size == -1 else group_size,
            )
            targets = ["Linear"] if len(kinds) == 1 else modules
            groups[f"group_{index}"] = QuantizationScheme(targets=targets, weights=args, format="pack-quantized")
        config = QuantizationConfig(
            config_groups=groups,
            format="pack-quantized",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=[name for name in outline.linears if f"{name}.weight" not in outline.adapted],
        )
        # The packing of 3 bits has changed with the version, which is where the library's own writer puts it.
        content = config.model_dump(mode="json", exclude_none=True) | {"version": version(self.package)}
        if any(not symmetric for _, _, symmetric in kinds):
            # Versions 0.18 to 0.20 else expect zero points in a shape that nothing writes; vLLM ignores it.
            content["dequantize"] = True
        return {"quantization_config": content}

    @contextmanager
    def writing(self, folder: Path, outline: Outline, notes: list[str]) -> Iterator[Add]:
        """Safetensors files."""
        if _mixed(outline):
            common = next(iter(self.grids(outline).values()))
            notes.append(
                "grids differ and have zero points, which transformers loads of one kind only: all are written with "
                f"{common.bits} bits in groups of {common.group_size}"
            )
        with super().writing(folder, outline, notes) as add:
            yield add


def _by_row(outline: Outline) -> dict[str, Grid]:
    """The grids that were trained on, with a group_size of -1 where one scale serves a row."""
    return {
        tensor.name: replace(tensor.grid, group_size=-1) if tensor.grid.group_size == tensor.out_in[1] else tensor.grid
        for tensor in outline.tensors
        if tensor.grid is not None
    }


def _mixed(outline: Outline) -> bool:
    """Whether grids differ, and some have zero points."""
    kinds = set(_by_row(outline).values())
    return len(kinds) > 1 and any(grid.zero_point != "none" for grid in kinds)
