"""MLX's affine quantization, for mlx-lm: w = scale * u + bias with u counted from 0, in groups of 32, 64 or 128."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import Format, Outline
from .bit_stream import bit_stream
from .engines import Engine
from .presets import Preset

_GROUPS = (128, 64, 32)


def _mlx_lm(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)  # as the reference: what is stored in 16 bits, and what is computed
    logits = model(mx.array(ids.numpy())).astype(mx.float32)
    return torch.from_numpy(np.array(logits))


class MLX(Format):
    """2, 3, 4 and 8 bits with any zero; larger groups are cut into 128, 64 or 32, whose scales are repeated."""

    name = "mlx"
    library = "mlx"
    engines = (Engine("mlx-lm", "mlx_lm", _mlx_lm, largest_kl=1e-10, largest_difference=1e-4),)
    # It keeps a bias a group in any case.
    presets = tuple(Preset("mlx", {"bits": bits, "zero_point": "float", "group_size": 128}) for bits in (2, 3, 4, 8))
    usage = """\
```bash
mlx_lm.generate --model THIS_REPOSITORY --prompt ...
```"""

    def holds(self, grid: Grid) -> bool:
        """As the class says."""
        return grid.bits in (2, 3, 4, 8) and (grid.group_size == -1 or grid.group_size % 32 == 0)

    def stored_as(self, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
        """A scale and a bias a group."""
        shared = 2 * torch.finfo(self.scale_dtype(grid)).bits
        return f"affine {grid.bits} bits", grid.bits + shared / _group(grid)

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """The bias of an integer zero, -S * z, has more digits than S: both are kept in float32."""
        return torch.float32 if grid.zero_point == "integer" else grid.scale_dtype

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Unsigned codes in words, scales and biases [out, n_groups]."""
        grid, dtype = weight.grid, self.scale_dtype(weight.grid)
        if grid.zero_point == "float":
            assert weight.zero is not None
            biases = weight.zero
        else:
            zero = 0.0 if weight.zero is None else weight.zero
            biases = weight.scale * (grid.qmin - zero)  # exact in float32: a 16-bit scale times a small integer
        times = grid.group_size // _group(grid)
        return {
            "weight": bit_stream(weight.codes.to(torch.int16) - grid.qmin, grid.bits).view(torch.uint32),
            "scales": weight.scale.to(dtype).repeat_interleave(times, dim=-1),
            "biases": biases.to(dtype).repeat_interleave(times, dim=-1),
        }

    def config(self, outline: Outline) -> dict[str, Any]:
        """Each layer's bits and group, where they are not the first's; mlx-lm leaves a layer without scales alone."""
        every = {
            name.removesuffix(".weight"): {"group_size": _group(grid), "bits": grid.bits}
            for name, grid in outline.adapted.items()
        }
        first = next(iter(every.values()))
        return _rope(outline) | {"quantization": first | {name: own for name, own in every.items() if own != first}}


def _group(grid: Grid) -> int:
    """The largest of MLX's groups that divides the grid's; 32 for a row of unknown length."""
    return 32 if grid.group_size == -1 else next(size for size in _GROUPS if grid.group_size % size == 0)


def _rope(outline: Outline) -> dict[str, Any]:
    """RoPE's settings where all of mlx-lm's models look for them: few know transformers 5's `rope_parameters`."""
    rope = getattr(outline.config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:  # none, or by kind of layer
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = rope.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"]} | ({} if plain else {"rope_scaling": scaling})
