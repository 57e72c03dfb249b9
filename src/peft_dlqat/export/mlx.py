"""MLX's affine quantization, for mlx-lm: w = scale * u + bias with u counted from 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..formats import RULES, bit_stream, mlx_group
from ..quant.quantizer import QuantizedWeight
from .fitting import fitted, refuse_conv1d
from .folder import TensorFiles
from .hf import as_dense, write_config
from .options import Options
from .source import Source

_RULE = RULES["mlx"]


def write(source: Source, folder: Path, options: Options) -> None:
    """Write codes, scales and biases, and the config that names each layer's bits and group."""
    refuse_conv1d(source, _RULE, options)
    files = TensorFiles(folder, options.max_shard_size)
    settings: dict[str, dict[str, int]] = {}
    for entry, value in fitted(source, _RULE, options):
        if not isinstance(value, QuantizedWeight):
            files.add(entry.name, as_dense(value, entry, options))
            continue
        module = entry.name.removesuffix(".weight")
        packed = tensors(value)
        group = value.codes.shape[1] // packed["scales"].shape[1]
        settings[module] = {"group_size": group, "bits": value.grid.bits}
        for name, tensor in packed.items():
            files.add(f"{module}.{name}", tensor)
    files.close()
    first = next(iter(settings.values()), None)
    sections = _rope(source)
    if first is not None:
        others = {name: own for name, own in settings.items() if own != first}
        # mlx-lm leaves a layer alone that has no scales in the files.
        sections["quantization"] = {**first, **others}
    write_config(source, folder, options.dtype, **sections)


def _rope(source: Source) -> dict[str, Any]:
    """RoPE's settings where all of mlx-lm's models look for them: few know transformers 5's `rope_parameters`."""
    rope = getattr(source.config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:  # none, or by kind of layer
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = rope.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"]} | ({} if plain else {"rope_scaling": scaling})


def tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """One layer's tensors, by their names in the module."""
    grid, dtype = weight.grid, _RULE.scale_dtype(weight.grid)
    group = mlx_group(grid)
    assert group is not None
    if grid.zero_point == "float":
        assert weight.zero is not None
        biases = weight.zero
    else:
        zero = 0.0 if weight.zero is None else weight.zero
        biases = weight.scale * (grid.qmin - zero)  # exact in float32: a 16-bit scale times a small integer
    times = grid.group_size // group
    return {
        "weight": bit_stream(weight.codes.to(torch.int16) - grid.qmin, grid.bits).view(torch.uint32),
        "scales": weight.scale.to(dtype).repeat_interleave(times, dim=-1),
        "biases": biases.to(dtype).repeat_interleave(times, dim=-1),
    }
