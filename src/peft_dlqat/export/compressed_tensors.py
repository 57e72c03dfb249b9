"""compressed-tensors' `pack-quantized`, for transformers and vLLM."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..formats import RULES
from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .fitting import fitted, fitting_grid, refuse_conv1d
from .folder import TensorFiles
from .hf import as_dense, write_config
from .options import Options
from .source import Source

_RULE = RULES["compressed-tensors"]


def write(source: Source, folder: Path, options: Options) -> None:
    """Write codes, scales and zero points by the library's own packing, and the config that names them."""
    refuse_conv1d(source, _RULE, options)
    files = TensorFiles(folder, options.max_shard_size)
    common = _common_grid(source)
    if common is not None:
        options.notes.append(
            f"grids differ and have zero points, which transformers loads of one kind only: all are written with "
            f"{common.bits} bits in groups of {common.group_size}"
        )
    packed: dict[str, Grid] = {}
    for entry, value in fitted(source, _RULE, options):
        if not isinstance(value, QuantizedWeight):
            files.add(entry.name, as_dense(value, entry, options))
            continue
        if common is not None:
            value = on_grid(value, common)
            options.grids[entry.name] = common
        module = entry.name.removesuffix(".weight")
        by_row = common is None and value.scale.shape[1] == 1
        packed[module] = replace(value.grid, group_size=-1) if by_row else value.grid
        for name, tensor in tensors(value).items():
            files.add(f"{module}.{name}", tensor)
    files.close()
    write_config(source, folder, options.dtype, quantization_config=_quantization_config(source, packed))


def tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """One layer's tensors, by their names in the module."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    bits = weight.grid.bits
    found = {
        "weight_packed": pack_to_int32(weight.codes, bits),
        "weight_scale": weight.scale.to(_RULE.scale_dtype(weight.grid)),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.zero is not None:
        found["weight_zero_point"] = pack_to_int32(weight.zero.to(torch.int8), bits, packed_dim=0)
    return found


def _common_grid(source: Source) -> Grid | None:
    """The one grid in which all weights can be written, where there are several and some have zero points."""
    packed = [entry for entry in source.entries if entry.grid is not None and not entry.transposed]
    grids = [fitting_grid(entry, _RULE) for entry in packed]
    found = [grid for grid in grids if grid is not None]
    kinds = {
        (grid.bits, grid.zero_point, None if grid.group_size == entry.shape[-1] else grid.group_size)
        for entry, grid in zip(packed, grids, strict=True)
        if grid is not None
    }
    if len(kinds) < 2 or all(grid.zero_point == "none" for grid in found):
        return None
    size = math.gcd(*(grid.group_size for grid in found))
    return Grid(max(grid.bits for grid in found), size, "integer", found[0].scale_dtype)


def on_grid(weight: QuantizedWeight, grid: Grid) -> QuantizedWeight:
    """The same weight on a wider grid of smaller groups: the same codes and zero points, the same scale more often."""
    times = weight.grid.group_size // grid.group_size
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    return QuantizedWeight(
        weight.codes, weight.scale.repeat_interleave(times, -1), zero.repeat_interleave(times, -1), grid
    )


def _quantization_config(source: Source, packed: dict[str, Grid]) -> dict[str, Any]:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    kinds: dict[tuple[int, int, bool], list[str]] = {}
    for module, grid in packed.items():
        kinds.setdefault((grid.bits, grid.group_size, grid.zero_point == "none"), []).append(module)
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
        ignore=[name for name in source.linears if name not in packed],
    )
    content = config.model_dump(mode="json", exclude_none=True)
    # Without it compressed-tensors 0.18 to 0.20 expect zero points in a shape that nothing writes; vLLM ignores it.
    if any(not symmetric for _, _, symmetric in kinds):
        content["dequantize"] = True
    return content
