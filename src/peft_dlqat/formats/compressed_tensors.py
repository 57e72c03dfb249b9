"""compressed-tensors' `pack-quantized`, for transformers and vLLM.

Codes in int32 words along in, scales [out, n_groups], zero points packed along out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open

from ..files import save_tensors
from ..messages import shown
from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from .base import Add, Format, Outline, per_group
from .bit_stream import from_words, to_words
from .engines import TRANSFORMERS
from .layout import Layout, checked_grid, signed, signed_zeros, unsigned, unsigned_zeros
from .presets import Preset

_PACKED = "pack-quantized"


def _transformers(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """In float32. Beside zero points transformers multiplies in the dtype of the scales: these are made float32."""
    narrow = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            if any(name.endswith(".weight_zero_point") for name in names):
                narrow[file] = {name: tensors.get_tensor(name) for name in names}
    if not narrow:
        return TRANSFORMERS.logits(folder, ids)
    with TemporaryDirectory(prefix="dlqat-") as made:
        for path in folder.iterdir():
            if path not in narrow and path.is_file():
                (Path(made) / path.name).symlink_to(path.resolve())
        for file, found in narrow.items():
            wide = {key: value.float() if key.endswith(".weight_scale") else value for key, value in found.items()}
            save_tensors(wide, Path(made) / file.name, metadata={"format": "pt"})
        return TRANSFORMERS.logits(Path(made), ids)


class CompressedTensors(Format):
    """2, 3, 4 and 8 bits, symmetric or with an integer zero, any group size."""

    name = "compressed-tensors"
    package = "compressed-tensors"
    minimum = "0.18"  # from which on 3 bits are packed without gaps; what 0.17 writes is another model to it
    extra = "compressed-tensors"
    engines = (replace(TRANSFORMERS, logits=_transformers),)
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
        return f"{_PACKED} int{grid.bits}", grid.bits + per_group(grid, shared)

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """Beside zero points float32: transformers' loader multiplies in the dtype of the scale, and then rounds."""
        return torch.float32 if grid.zero_point == "integer" else grid.scale_dtype

    def check_model(self, outline: Outline) -> None:
        """Refuse Llama 4's experts: transformers makes single ones of them where a file is quantized, and finds none.

        Raises:
            ValueError: names their weight.
        """
        stacked = next((tensor.name for tensor in outline.tensors if len(tensor.shape) == 3), "")
        if stacked and outline.config.get_text_config().model_type == "llama4_text":
            raise ValueError(
                f"{stacked}: of Llama 4, transformers loads single experts from a {self.name} file, and would leave "
                "these, which are stacked, at random values; export as 'dense'."
            )

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
        """As the library packs them."""
        return _tensors(weight, self.scale_dtype(weight.grid))

    def layout(self, section: Mapping[str, Any]) -> Layout | None:
        """Of what is packed."""
        return _PackedLayout(section) if section.get("quant_method") == self.name else None

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
            groups[f"group_{index}"] = QuantizationScheme(targets=targets, weights=args, format=_PACKED)
        config = QuantizationConfig(
            config_groups=groups,
            format=_PACKED,
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


class _PackedLayout(Layout):
    """Weights by a `quantization_config`.

    Raises:
        ValueError: for other formats of the library, quantized activations, and what it does beside.
    """

    format = "compressed-tensors"
    parts = MappingProxyType({"weight_packed": 0, "weight_scale": 0, "weight_zero_point": 0})
    fixed = MappingProxyType(
        {
            "weight_shape": "its weight_shape is another than the config's",
            "weight_g_idx": "its inputs are not grouped with their neighbours, as with actorder='group'",
        }
    )

    def __init__(self, section: Mapping[str, Any]) -> None:
        for name in ("kv_cache_scheme", "transform_config", "sparsity_config"):
            found = section.get(name)
            # Pruned weights that are stored like all others are no other model.
            if found and not (name == "sparsity_config" and found.get("format") == "dense"):
                raise ValueError(f"{name}={shown(section[name])} makes another model of its weights")
        self._ignored = [str(name) for name in section.get("ignore") or ()]
        # By the target that a module is found by; names stand before regexes, and these before classes.
        self._schemes: dict[str, Mapping[str, Any]] = {}
        for scheme in (section.get("config_groups") or {}).values():
            own = _scheme(scheme, section.get("format"))
            self._schemes |= {str(target): own for target in scheme.get("targets") or ()}
        self._padded = _version(section.get("version")) < (0, 18)
        self.regexes = tuple(
            name.removeprefix("re:") for name in (*self._ignored, *self._schemes) if name.startswith("re:")
        )

    def grid(self, module: str, kinds: Iterable[str], in_features: int, scale_dtype: torch.dtype) -> Grid | None:
        """Of the group that targets the module."""
        names = {module, *kinds}
        if any(_matches(entry, names, module) for entry in self._ignored):
            return None
        found = sorted(
            (target for target in self._schemes if _matches(target, names, module)),
            key=lambda target: (target != module, not target.startswith("re:"), target),
        )
        if not found:
            return None
        own = self._schemes[found[0]]
        by_row = own.get("strategy") == "channel" or own.get("group_size") == -1
        size = in_features if by_row else own.get("group_size")
        kind = "none" if own.get("symmetric", True) else "integer"
        grid = checked_grid(own.get("num_bits", 8), size, kind, scale_dtype, range(2, 9))  # type: ignore[arg-type]
        if self._padded and 32 % grid.bits:
            raise ValueError(
                f"it has {grid.bits} bits, which compressed-tensors packed otherwise before version 0.18; load it "
                "with the version that wrote it, and save it with a newer one"
            )
        return grid

    def weight(self, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """Rows of words, zero points packed along the outputs."""
        scale = tensors["weight_scale"].float()
        codes = signed(from_words(tensors["weight_packed"], grid.bits, scale.shape[1] * grid.group_size), grid.bits)
        zero = None
        if grid.zero_point == "integer":
            zero = signed_zeros(from_words(tensors["weight_zero_point"].t(), grid.bits, len(codes)).t(), grid)
        return QuantizedWeight(codes, scale, zero, grid)

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """With the scales' own dtype."""
        return _tensors(weight, weight.grid.scale_dtype)


def _tensors(weight: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    bits = weight.grid.bits
    found = {
        "weight_packed": to_words(unsigned(weight.codes, bits), bits),
        "weight_scale": weight.scale.to(scale_dtype),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.zero is not None:
        found["weight_zero_point"] = to_words(unsigned_zeros(weight).t(), bits).t().contiguous()
    return found


def _scheme(scheme: Any, format: str | None) -> Mapping[str, Any]:
    """What a config group says of weights.

    Raises:
        ValueError: for what is not packed integers of a group or a row, or rounds more than the weights.
    """
    if not isinstance(scheme, Mapping):
        raise ValueError(f"its config group {shown(scheme)} names a preset, and must say bits and groups itself")
    own, found = scheme.get("weights") or {}, scheme.get("format") or format
    if found != _PACKED:
        raise ValueError(f"its format is {shown(found)}, and only {_PACKED!r} can be opened")
    for name in ("input_activations", "output_activations"):
        if scheme.get(name):
            raise ValueError(f"it has {name}, which are rounded too; only weights may be")
    for name, known in (("type", ("int",)), ("strategy", ("group", "channel", None)), ("dynamic", (False,))):
        if own.get(name, known[0]) not in known:
            raise ValueError(f"{name}={shown(own[name])} of its weights must be {known[0]!r}")
    return own  # type: ignore[no-any-return]


def _matches(target: str, names: set[str], module: str) -> bool:
    """Whether a target is a module's name, that of a class, or a regex that its name begins with."""
    return re.match(target[3:], module) is not None if target.startswith("re:") else target in names


def _version(text: Any) -> tuple[int, ...]:
    """The first two numbers of a version; of none, the oldest."""
    return tuple(int(part) for part in re.findall(r"\d+", str(text or "0"))[:2])
