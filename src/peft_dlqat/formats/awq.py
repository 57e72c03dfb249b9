"""AutoAWQ's format "gemm", for vLLM, transformers and gptqmodel.

Codes [in, out] and zero points [n_groups, out] packed along out, eight of 4 bits a word in an order of their own;
scales [n_groups, out].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..messages import shown
from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import IN_FLOAT16, Format, Outline, per_group
from .bit_stream import from_words, to_words
from .engines import Engine, float32_logits
from .layout import Layout, checked_grid, group_of, signed, signed_zeros, unsigned, unsigned_zeros

_BITS = 4
# Which of eight outputs stands where in a word, the lowest bits first.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _gptqmodel(folder: Path, ids: torch.Tensor, as_float32: bool = True) -> torch.Tensor:
    """By its own decoding of the weights in float32, or as users run it: its kernel rounds inputs to float16."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH_AWQ, dtype=torch.float16).model.float()
    for name, module in list(model.named_modules()) if as_float32 else ():
        if hasattr(module, "qweight"):
            with torch.device("meta"):
                linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            size = group_of(module.group_size, module.in_features)
            weight = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), module.bits, size).t()
            linear.weight = torch.nn.Parameter(weight.contiguous())
            if module.bias is not None:
                linear.bias = torch.nn.Parameter(module.bias.float())
            model.set_submodule(name, linear)
    return float32_logits(model, ids)


class AWQ(Format):
    """4 bits, symmetric or with an integer zero, with scales that fit float16; one group size for all layers."""

    name = "awq"
    multiple = 32
    engines = (
        Engine(
            "gptqmodel",
            "gptqmodel",
            _gptqmodel,
            largest_difference=1e-4,
            dense_dtype=torch.float16,
            served=lambda folder, ids: _gptqmodel(folder, ids, as_float32=False),
        ),
    )
    usage = """\
```bash
vllm serve THIS_REPOSITORY
```"""

    def holds(self, grid: Grid) -> bool:
        """As the class says."""
        return grid.bits == _BITS and grid.zero_point != "float" and grid.scale_dtype in IN_FLOAT16

    def stored_as(self, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
        """Symmetric grids have zero points too."""
        return f"awq int{grid.bits}", grid.bits + per_group(grid, 16 + grid.bits)

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """Always float16."""
        return torch.float16

    def check_model(self, outline: Outline) -> None:
        """Refuse groups of several sizes, of which the config can name one.

        Raises:
            ValueError: naming them.
        """
        sizes = {_size(tensor.grid, tensor.out_in[1]) for tensor in outline.tensors if tensor.grid}
        if len(sizes) > 1:
            raise ValueError(
                f"awq has one group_size for all layers, and these have {sorted(sizes)}; use one, or exclude_modules."
            )

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """As the module's docstring says; unsigned codes."""
        return _tensors(replace(weight, grid=replace(weight.grid, scale_dtype=torch.float16)))

    def layout(self, section: Mapping[str, Any]) -> Layout | None:
        """Of version "gemm"."""
        return _AWQLayout(section) if section.get("quant_method") == self.name else None

    def config(self, outline: Outline) -> dict[str, Any]:
        """The group size, and the layers that stay dense."""
        sizes = [_size(tensor.grid, tensor.out_in[1]) for tensor in outline.tensors if tensor.grid]
        section = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": _BITS,
            "group_size": sizes[0],
            "zero_point": True,
            "modules_to_not_convert": [name for name in outline.linears if f"{name}.weight" not in outline.adapted],
        }
        return {"quantization_config": section}


class _AWQLayout(Layout):
    """Weights by a `quantization_config`.

    Raises:
        ValueError: for other versions.
    """

    format = "awq"
    parts = MappingProxyType({"qweight": 1, "qzeros": 1, "scales": 1})
    fixed = MappingProxyType({})

    def __init__(self, section: Mapping[str, Any]) -> None:
        found = section.get("version") or section.get("format") or section.get("checkpoint_format") or "gemm"
        if str(found).lower() != "gemm" or section.get("backend") == "llm-awq":
            raise ValueError(f"its version is {shown(found)}, and only 'gemm' can be opened")
        if not section.get("zero_point", True):
            raise ValueError("zero_point=False says that it has no zero points, without which 'gemm' does not go")
        self._section = section

    def grid(self, module: str, kinds: Iterable[str], in_features: int, scale_dtype: torch.dtype) -> Grid | None:
        """One for all but the modules that are named."""
        left_out = [str(name) for name in self._section.get("modules_to_not_convert") or ()]
        if any(f".{name}." in f".{module}." for name in left_out):
            return None
        size = group_of(self._section.get("group_size", 128), in_features)
        return checked_grid(self._section.get("bits", _BITS), size, "integer", scale_dtype, (_BITS,))

    def weight(self, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """Outputs as rows."""
        codes, zeros = (_outputs(tensors[name]).t() for name in ("qweight", "qzeros"))
        scale = tensors["scales"].t().float()
        return QuantizedWeight(signed(codes, _BITS), scale, signed_zeros(zeros, grid), grid)

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """As they are written for models of 16 bits, with the scales' own dtype."""
        return _tensors(weight)


def _tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    return {
        "qweight": _words(unsigned(weight.codes, _BITS).t()),
        "qzeros": _words(unsigned_zeros(weight).t()),
        "scales": weight.scale.t().to(weight.grid.scale_dtype).contiguous(),
    }


def _words(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers [..., out] in words [..., out / 8]."""
    return to_words(numbers.unflatten(-1, (-1, len(_ORDER)))[..., _ORDER].flatten(-2), _BITS)


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """Numbers [..., out] of words [..., out / 8]."""
    order = [_ORDER.index(place) for place in range(len(_ORDER))]
    numbers = from_words(words, _BITS, words.shape[-1] * len(_ORDER))
    return numbers.unflatten(-1, (-1, len(_ORDER)))[..., order].flatten(-2)


def _size(grid: Grid | None, in_features: int) -> int:
    """As the config has it: -1 for one scale a row."""
    assert grid is not None
    return -1 if grid.group_size == in_features else grid.group_size
