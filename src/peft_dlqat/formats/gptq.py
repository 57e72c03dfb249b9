"""GPTQ's format, for gptqmodel, vLLM and onnxruntime-genai's builder: version 1 is written, and both are read.

Codes [in, out] packed along in, scales [n_groups, out], zero points packed along out, in version 1 less one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..messages import shown
from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import IN_FLOAT16, Format, Outline, TensorInfo, per_group
from .bit_stream import from_words, to_words
from .engines import Engine, float32_logits
from .layout import Layout, checked_grid, group_of, signed, signed_zeros, unsigned, unsigned_zeros
from .presets import Preset

_BITS = (2, 3, 4, 8)
# Of what gptqmodel puts into a config, what makes another model of the weights: the last rounds the inputs.
_NO_WEIGHTS = ("adapter", "rotation", "activation")


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
        for bits in _BITS
    )
    usage = """\
```python
from gptqmodel import GPTQModel

model = GPTQModel.load("THIS_REPOSITORY")
```"""

    def holds(self, grid: Grid) -> bool:
        """As the class says."""
        return grid.bits in _BITS and grid.zero_point != "float" and grid.scale_dtype in IN_FLOAT16

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
        return _tensors(replace(weight, grid=replace(weight.grid, scale_dtype=torch.float16)), version=1)

    def layout(self, section: Mapping[str, Any]) -> Layout | None:
        """Of both versions."""
        return _GPTQLayout(section) if section.get("quant_method") == self.name else None

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


class _GPTQLayout(Layout):
    """Weights by a `quantization_config`, or a quantize_config.json.

    Raises:
        ValueError: for packings other than the two versions'.
    """

    format = "gptq"
    parts = MappingProxyType({"qweight": 1, "qzeros": 1, "scales": 1})
    fixed = MappingProxyType({"g_idx": "its inputs are not grouped with their neighbours, as with desc_act=True"})

    def __init__(self, section: Mapping[str, Any]) -> None:
        versions = {section[name] for name in ("checkpoint_format", "format") if section.get(name)} or {"gptq"}
        if len(versions) > 1 or not versions <= {"gptq", "gptq_v2"} or section.get("is_marlin_format"):
            raise ValueError(f"its packing is {shown(sorted(versions))}, and only 'gptq' and 'gptq_v2' can be opened")
        if (word := section.get("pack_dtype") or "int32") != "int32":
            raise ValueError(f"pack_dtype={shown(word)} must be 'int32'")
        if strange := [name for name in _NO_WEIGHTS if section.get(name)]:
            raise ValueError(f"{strange[0]}={shown(section[strange[0]])} makes another model of its weights")
        self._section, self._dynamic = section, section.get("dynamic") or {}
        if not isinstance(self._dynamic, Mapping):
            raise ValueError(f"dynamic={shown(self._dynamic)} must be an object, of settings by regex")
        self._version = 2 if versions == {"gptq_v2"} else 1
        # Which borrows in the place of a zero point of 0; others let it wrap around, or break its neighbours.
        meta = section.get("meta") or {}
        self._borrows = any(str(name).startswith("gptqmodel:") for name in _listed(meta.get("quantizer")))
        self.regexes = tuple(_regex(key) for key in self._dynamic)

    def grid(self, module: str, kinds: Iterable[str], in_features: int, scale_dtype: torch.dtype) -> Grid | None:
        """As the config says for all, or the first regex that matches."""
        own = next((key for key in self._dynamic if re.match(_regex(key), module)), None)
        if own is not None and own.startswith("-:"):
            return None
        settings = {**self._section, **(self._dynamic[own] if own is not None else {})}
        size = group_of(settings.get("group_size", 128), in_features)
        kind = "none" if settings.get("sym", True) else "integer"
        return checked_grid(settings.get("bits", 4), size, kind, scale_dtype, _BITS)  # type: ignore[arg-type]

    def weight(self, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """Outputs as rows."""
        words = tensors["qweight"].t()
        zeros = tensors["qzeros"]
        if self._version == 1:
            zeros = self._more(zeros, grid.bits)
        zeros = from_words(zeros, grid.bits, words.shape[0]).t()
        codes = signed(from_words(words, grid.bits, words.shape[1] * 32 // grid.bits), grid.bits)
        return QuantizedWeight(codes, tensors["scales"].t().float(), signed_zeros(zeros, grid), grid)

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """In the file's version."""
        return _tensors(weight, self._version)

    def _more(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        """Version 2's zero points of version 1's."""
        more = shifted(words, bits, 1)
        count = words.shape[1] * 32 // bits
        if not self._borrows and (from_words(words, bits, count) == 2**bits - 1).any():
            raise ValueError(
                "it has a zero point of 0, which version 1 has no number for: engines read it and its neighbours in "
                "different ways; use a file of version 2 ('gptq_v2')"
            )
        return more


def _tensors(weight: QuantizedWeight, version: int) -> dict[str, torch.Tensor]:
    grid = weight.grid
    zeros = to_words(unsigned_zeros(weight).t(), grid.bits)
    return {
        "qweight": to_words(unsigned(weight.codes, grid.bits), grid.bits).t().contiguous(),
        "qzeros": shifted(zeros, grid.bits, -1) if version == 1 else zeros,
        "scales": weight.scale.t().to(grid.scale_dtype).contiguous(),
        "g_idx": torch.arange(weight.codes.shape[1], dtype=torch.int32) // grid.group_size,
    }


def shifted(words: torch.Tensor, bits: int, by: int) -> torch.Tensor:
    """Numbers in words of 32 bits, all one more or less, as gptqmodel has it.

    Words of whole numbers are added to: a number that leaves its range carries into the next. 3 bits wrap around.
    """
    if 32 % bits:
        count = words.shape[-1] * 32 // bits
        return to_words(from_words(words, bits, count) + by & 2**bits - 1, bits)
    ones = by * sum(1 << shift for shift in range(0, 32, bits))
    return (words.long() + ones).to(torch.int32)


def _regex(key: str) -> str:
    """Without the sign that says whether the modules are quantized."""
    return key[2:] if key.startswith(("+:", "-:")) else key


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
