"""MLX's affine quantization, for mlx-lm: w = scale * u + bias with u counted from 0, in groups of 32, 64 or 128."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..messages import shown
from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import Format, Outline
from .bit_stream import from_words, to_words
from .engines import Engine
from .layout import Layout, checked_grid, signed, unsigned
from .presets import Preset

_GROUPS = (128, 64, 32)
# Models of which mlx-lm changes no number, name or shape when it loads them. Of others it adds 1 to norms, say.
_AS_IN_TRANSFORMERS = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmo2")
)


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
    engines = (Engine("mlx-lm", "mlx_lm", _mlx_lm, largest_difference=1e-4),)
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
            "weight": to_words(unsigned(weight.codes, grid.bits), grid.bits).view(torch.uint32),
            "scales": weight.scale.to(dtype).repeat_interleave(times, dim=-1),
            "biases": biases.to(dtype).repeat_interleave(times, dim=-1),
        }

    def layout(self, section: Mapping[str, Any]) -> Layout | None:
        """Of a section that names no method, but bits and groups."""
        known = "quant_method" not in section and {"bits", "group_size"} <= section.keys()
        return _MLXLayout(section) if known else None

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


class _MLXLayout(Layout):
    """Weights by the `quantization` of a config.json.

    Raises:
        ValueError: for modes other than affine.
    """

    format = "mlx"
    parts = MappingProxyType({"scales": 0, "weight": 0, "biases": 0})
    fixed = MappingProxyType({})
    models = _AS_IN_TRANSFORMERS

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._section = section
        for own in (section, *(value for value in section.values() if isinstance(value, Mapping))):
            if (mode := own.get("mode", "affine")) != "affine":
                raise ValueError(f"its mode is {shown(mode)}, and only 'affine' can be opened")

    def grid(self, module: str, kinds: Iterable[str], in_features: int, scale_dtype: torch.dtype) -> Grid | None:
        """As the config says for the module, or for all."""
        own = self._section.get(module, {})
        if own is False:
            return None
        settings = self._section if own is True else {**self._section, **own}
        if (size := settings.get("group_size")) not in _GROUPS:
            raise ValueError(f"group_size={shown(size)} must be one of {', '.join(map(str, _GROUPS))}")
        return checked_grid(settings.get("bits"), size, "float", scale_dtype, (2, 3, 4, 5, 6, 8))

    def weight(self, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """With biases as offsets."""
        scales, words = tensors["scales"], tensors["weight"].view(torch.int32)
        codes = signed(from_words(words, grid.bits, scales.shape[1] * grid.group_size), grid.bits)
        return QuantizedWeight(codes, scales.float(), tensors["biases"].float(), grid)

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """As they are written for models of 16 bits."""
        return MLX().tensors(weight)
