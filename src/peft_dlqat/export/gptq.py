"""GPTQ's format, version 1, for gptqmodel, vLLM and onnxruntime-genai's builder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..formats import RULES, bit_stream
from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .fitting import fitted, refuse_conv1d
from .folder import TensorFiles, write_json
from .hf import as_dense, write_config
from .options import Options
from .source import Source

_RULE = RULES["gptq"]


def write(source: Source, folder: Path, options: Options) -> None:
    """Write codes, scales and zero points, and the config that names them."""
    refuse_conv1d(source, _RULE, options)
    files = TensorFiles(folder, options.max_shard_size)
    packed: dict[str, Grid] = {}
    for entry, value in fitted(source, _RULE, options):
        if not isinstance(value, QuantizedWeight):
            files.add(entry.name, as_dense(value, entry, options))
            continue
        module = entry.name.removesuffix(".weight")
        packed[module] = value.grid
        for name, tensor in tensors(value).items():
            files.add(f"{module}.{name}", tensor)
    files.close()
    config = _quantization_config(source, packed)
    write_json(folder / "quantize_config.json", config)
    write_config(source, folder, options.dtype, quantization_config=config)


def tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """One layer's tensors, by their names in the module: [in, out] packed along in, zero points along out."""
    grid = weight.grid
    codes = weight.codes.to(torch.int16) - grid.qmin
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    # Version 1 stores one less, and lets 0 wrap around.
    zeros = (zero.to(torch.int16) - grid.qmin - 1) % 2**grid.bits
    return {
        "qweight": bit_stream(codes, grid.bits).t().contiguous(),
        "qzeros": bit_stream(zeros.t(), grid.bits),
        "scales": weight.scale.t().to(torch.float16),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // grid.group_size,
    }


def _quantization_config(source: Source, packed: dict[str, Grid]) -> dict[str, Any]:
    def settings(module: str) -> dict[str, Any]:
        grid = packed[module]
        in_features = next(e.in_features for e in source.entries if e.name == f"{module}.weight")
        size = -1 if grid.group_size == in_features else grid.group_size
        return {"bits": grid.bits, "group_size": size, "sym": grid.zero_point == "none"}

    every = {module: settings(module) for module in packed}
    # Most layers' settings are the default, the others are named.
    common = max(every.values(), key=lambda own: sum(own == other for other in every.values()))
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(module)}$": own for module, own in every.items() if own != common
    }
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in source.linears if name not in packed}
    # gptqmodel refuses zero points in version 1 but for those of its own convention, which these follow: it looks for
    # its name among the producers.
    convention = [] if all(own["sym"] for own in every.values()) else ["gptqmodel:0.9.0"]
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **common,
        "desc_act": False,
        "lm_head": source.head in packed,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": ["peft-dlqat", *convention]},
    }
