"""A model out of a folder of safetensors files with quantized weights: GPTQ, AWQ, compressed-tensors or MLX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ..file_layers import can_keep, keep_in_file
from ..formats import FORMATS
from ..formats.layout import Layout
from ..formats.safetensors_folder import FolderOrigin, SafetensorsFolder, StoredTensor, read_json
from ..messages import cut, shown
from ..module_names import folded
from ..quant.affine import AFFINE, row_bytes
from ..quant.grid import SCALE_DTYPES, Grid
from ..quant.quantizer import QuantizedWeight
from ..record import weight_checksum
from ..regexes import check_matching_ends
from .checkpoint import replace_tensor
from .quantized_file import QuantizedFile

_SECTIONS = ("quantization_config", "quantization", "compression_config")
OF_GPTQ = "quantize_config.json"
# What two sections may say in different ways.
_OF_NO_WEIGHT = {"meta", "damp_percent", "model_name_or_path", "model_file_base_name"}
# Weights that are brought into the rows that are kept, at a time; zero points of 32 rows fill whole words.
_PIECE, _ROWS = 2**18, 32
# Buffers of old models that follow from the config; transformers passes them over, too.
_MADE_ANEW = ("rotary_emb.inv_freq", ".masked_bias")


class FolderModel(QuantizedFile):
    """A folder.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: for a folder without config.json or safetensors files.
        ValueError: for files that are damaged, and quantization that cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.folder, self.path = SafetensorsFolder.open(path), path
        self.layout = _layout(self.folder)
        self.format = self.layout.format

    @property
    def frozen_types(self) -> dict[str, int]:
        """None: what cannot be trained is not opened."""
        return {}

    def read_config(self) -> PretrainedConfig:
        """The folder's, without what it says of quantization: the model in memory is an ordinary one."""
        config = AutoConfig.from_pretrained(self.path)
        if self.layout.models is not None and config.model_type not in self.layout.models:
            raise ValueError(
                f"{self.path} is a {config.model_type!r}, and for {self.format} it is known of "
                f"{', '.join(sorted(self.layout.models))} only that its tensors are those of transformers; use a file "
                "of another format."
            )
        for name in _SECTIONS:
            if hasattr(config, name):
                delattr(config, name)
        return config

    def read_tokenizer(self) -> Any:
        """The folder's."""
        with suppress(OSError, ValueError):
            return AutoTokenizer.from_pretrained(self.path)
        return None

    def sha256(self) -> str:
        """Of the files of weights."""
        return self.folder.sha256()

    def fill(
        self, sha256: str, model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str
    ) -> FolderOrigin:
        """Weight by weight."""
        with suppress(OSError):  # has none
            model.generation_config = GenerationConfig.from_pretrained(self.path)
        placing = _Placing(self.folder, self.layout, sha256, model, dtype)
        placing.check()
        for module, grid in placing.grids.items():
            placing.keep(module, grid, device)
        if torch.device(device).type != "meta":
            for name in placing.dense:
                placing.put(name, device)
        model.tie_weights()
        return placing.origin


def is_of_a_layout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are quantized in a format of which some are opened here."""
    section = next((found for name in _SECTIONS if (found := config.get(name))), None)
    try:
        return isinstance(section, dict) and any(format.layout(section) is not None for format in FORMATS.values())
    except (ValueError, TypeError, AttributeError):
        return True


def _layout(folder: SafetensorsFolder) -> Layout:
    """How a folder keeps quantized weights.

    Raises:
        ValueError: for a folder that is not quantized, in two ways, or in one that cannot be opened.
    """
    sections = {name: found for name in _SECTIONS if (found := folder.config.get(name))}
    if (folder.path / OF_GPTQ).is_file():
        sections[OF_GPTQ] = {"quant_method": "gptq", **read_json(folder.path / OF_GPTQ)}
    if not sections:
        raise ValueError(
            f"{folder.path} has no quantized weights, as far as its config.json says; load it by "
            "AutoModelForCausalLM.from_pretrained, and give the config bits."
        )
    (name, section), *others = sections.items()
    for other, more in others:
        if not isinstance(section, dict) or not isinstance(more, dict) or not _agree(section, more):
            raise ValueError(
                f"{folder.path} says in {name} and in {other} how it is quantized, and not the same; "
                "remove the one that is not of these weights."
            )
    if not isinstance(section, dict):
        raise ValueError(f"{folder.path}/config.json: {name}={shown(section)} is no section.")
    try:
        for format in FORMATS.values():
            if (layout := format.layout(section)) is not None:
                _check_regexes(layout, name, {tensor.rpartition(".")[0] for tensor in folder.tensors})
                return layout
    except (TypeError, AttributeError) as error:  # a list where there should be a dict, say
        raise ValueError(f"{folder.path}/config.json: {name} is damaged ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{folder.path} cannot be opened: {error}.") from error
    raise ValueError(
        f"{folder.path} is quantized by {shown(section.get('quant_method'))}, and only GPTQ, AWQ (version 'gemm'), "
        "compressed-tensors (format 'pack-quantized'), MLX (mode 'affine') and GGUF can be opened; use such a file."
    )


def _check_regexes(layout: Layout, section: str, modules: Iterable[str]) -> None:
    """Refuse regexes that are none, or take very long to match the modules' names.

    Raises:
        ValueError: naming the first of them.
    """
    for regex in layout.regexes:
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{shown(regex)} is no regex ({error})") from error
    check_matching_ends({f"{section}_pattern": dict.fromkeys(layout.regexes)}, modules)


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in one.keys() & other.keys() - _OF_NO_WEIGHT)


class _Placing:
    """Puts a folder's tensors into an empty model.

    Attributes:
        grids: of the modules whose weights are quantized, by name.
        dense: tensors of the model that are not.
    """

    def __init__(
        self, folder: SafetensorsFolder, layout: Layout, sha256: str, model: PreTrainedModel, dtype: torch.dtype
    ) -> None:
        self.folder, self.layout, self.model, self.dtype = folder, layout, model, dtype
        self.state = model.state_dict(keep_vars=True)
        self.origin = FolderOrigin(folder.path, sha256, format=layout.format, folder=folder, layout=layout)
        self.grids: dict[str, Grid] = {}
        self.dense: list[str] = []

    def check(self) -> None:
        """Refuse a folder and a config that do not go together, by names, sizes and dtypes.

        Raises:
            ValueError: naming the tensors.
        """
        first = next(iter(self.layout.parts))
        modules = [name.removesuffix(f".{first}") for name in self.folder.tensors if name.endswith(f".{first}")]
        if not modules:
            raise ValueError(
                f"{self.folder.path} is quantized in {self.layout.format} as its config.json says, but none of its "
                f"tensors is a {first!r}; use another file of the model, or mend the config."
            )
        self._check_taken_as_they_are(f"{module}.weight" for module in modules)
        covered: dict[int, str] = {}
        taken: set[str] = set()
        for module in modules:
            try:
                self.grids[module] = self._grid(module)
                taken |= {f"{module}.{part}" for part in self._check_tensors(module, self.grids[module])}
            except (ValueError, TypeError, AttributeError) as error:  # an integer where there should be a list, say
                raise ValueError(f"{self.folder.path} cannot be opened: {module}: {cut(error)}.") from error
            self._cover(covered, f"{module}.weight")
            self.origin.names[f"{module}.weight"] = module
        self._check_taken_as_they_are(self.folder.tensors.keys() - taken)
        strange = []
        for name in self.folder.tensors.keys() - taken:
            if name in self.state:
                self._check_dense(name)
                self._cover(covered, name)
                self.dense.append(name)
            elif not name.endswith(_MADE_ANEW) and not self._is_no_bias(name):
                strange.append(name)
        if strange:
            raise ValueError(
                f"{self.folder.path} has {len(strange)} tensors that {type(self.model).__name__} has no place for: "
                f"{folded(sorted(strange))}; its config.json is another model's, or it must be converted first."
            )
        missing = [name for name, own in self.state.items() if id(own) not in covered and own.is_meta]
        if missing:
            raise ValueError(
                f"{self.folder.path} lacks {len(missing)} tensors of {type(self.model).__name__}: {folded(missing)}; "
                "its config.json is another model's, or it is not whole: copy or download it again."
            )

    def _check_taken_as_they_are(self, names: Iterable[str]) -> None:
        """Refuse names that stand for something else when transformers loads them: renamed, stacked or transposed."""
        changes = get_model_conversion_mapping(self.model)
        changed = sorted(name for name in names if any(change.rename_source_key(name)[1] for change in changes))
        if changed:
            raise ValueError(
                f"{self.folder.path} has {len(changed)} tensors that transformers converts when it loads a "
                f"{type(self.model).__name__}, and cannot be kept so: {folded(changed)}; use another model."
            )

    def _cover(self, covered: dict[int, str], name: str) -> None:
        """Refuse a second tensor for one of the model, but for a copy."""
        first = covered.setdefault(id(self.state[name]), name)
        if first != name and not self._is_copy(name, first):
            raise ValueError(
                f"{self.folder.path} has tensors for {name} beside those for {first}, and others, but its config ties "
                "the two; use another file of the model."
            )

    def _is_copy(self, name: str, other: str) -> bool:
        """Whether two tensors are the same, neither quantized: some files have those of a tied head twice."""
        one, two = (None if key in self.origin.names else self.folder.tensors.get(key) for key in (name, other))
        if one is None or two is None or (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        return _same_bytes(self.folder.read(name), self.folder.read(other))

    def _grid(self, module: str) -> Grid:
        """The grid of a module by the config and the dtype of its scales."""
        own = self.state.get(f"{module}.weight")
        if own is None or own.dim() != 2:
            raise ValueError("the config's model has no such weight: it is another model's")
        layer = self.model.get_submodule(module)
        if not can_keep(layer, tuple(own.shape)):
            raise ValueError(
                f"it is a {type(layer).__name__}, and only plain linear layers and embeddings can be kept"
            )
        scales = next((key for key in self.layout.parts if "scale" in key), "")
        dtype = self._tensor(module, scales).dtype
        if dtype is None or dtype not in SCALE_DTYPES.values():
            raise ValueError(f"its {scales} are of {dtype}, and must be floating point of 16 or 32 bits")
        kinds = [kind.__name__ for kind in type(layer).__mro__]
        grid = self.layout.grid(module, kinds, own.shape[1], dtype)
        if grid is None:
            raise ValueError("it is quantized, but the config says that it is not")
        if own.shape[1] % grid.group_size:
            raise ValueError(f"groups of {grid.group_size} do not divide its {own.shape[1]} inputs")
        if grid.group_size < own.shape[1] and grid.group_size * grid.bits % 8:
            raise ValueError(f"groups of {grid.group_size} codes of {grid.bits} bits fill no whole bytes")
        return grid

    def _check_tensors(self, module: str, grid: Grid) -> list[str]:
        """Refuse tensors of a weight that are not as the format has them for this grid; returns their names."""
        expected = self.layout.tensors(_empty(grid, *self.state[f"{module}.weight"].shape))
        for part, value in expected.items():
            if part in self.layout.fixed:
                continue
            found = self._tensor(module, part)
            if (found.shape, found.dtype) != (tuple(value.shape), value.dtype):
                raise ValueError(
                    f"{part} is {list(found.shape)} of {found.dtype}, but {grid.bits} bits in groups of "
                    f"{grid.group_size}, as the config says, make it {list(value.shape)} of {value.dtype}"
                )
        fixed = [part for part in self.layout.fixed if f"{module}.{part}" in self.folder.tensors]
        for part in fixed:
            if part not in expected or not torch.equal(self.folder.read(f"{module}.{part}"), expected[part]):
                raise ValueError(f"{self.layout.fixed[part]}, which cannot be opened; use another file of the model")
        return [*(part for part in expected if part not in self.layout.fixed), *fixed]

    def _tensor(self, module: str, part: str) -> StoredTensor:
        if (found := self.folder.tensors.get(f"{module}.{part}")) is None:
            raise ValueError(f"it has no {part}")
        return found

    def _check_dense(self, name: str) -> None:
        found, own = self.folder.tensors[name], self.state[name]
        if found.shape != tuple(own.shape) or found.dtype is None or not found.dtype.is_floating_point:
            raise ValueError(
                f"{self.folder.path} has {name} {list(found.shape)} of {found.dtype}, and the config's model has it "
                f"{list(own.shape)} in floating point; its config.json is another model's, or it is quantized in a "
                "way that cannot be opened."
            )

    def _is_no_bias(self, name: str) -> bool:
        """Whether a tensor is the bias of zeros that old GPTQ files give to layers without one."""
        module = name.removesuffix(".bias")
        return module != name and module in self.grids and not self.folder.read(name).any()

    def keep(self, module: str, grid: Grid, device: torch.device | str) -> None:
        """Put a layer into the model that keeps the weight as the folder has it."""
        layer = self.model.get_submodule(module)
        rows, columns = self.state[f"{module}.weight"].shape
        packed = torch.empty(rows, row_bytes(columns, grid), dtype=torch.uint8, device=device)
        if not packed.is_meta:  # nobody wants more than sizes
            tensors = {part: self.folder.read(f"{module}.{part}") for part in self._parts(module)}
            count = max(1, _PIECE // columns // _ROWS) * _ROWS
            for start in range(0, rows, count):
                own = {
                    part: _of_rows(value, self.layout.parts[part], start, min(start + count, rows), rows)
                    for part, value in tensors.items()
                }
                packed[start : start + count] = self._packed(module, own, grid).to(device)
        keep_in_file(self.model, layer, packed, AFFINE.name, grid, self.dtype)

    def _parts(self, module: str) -> list[str]:
        return [part for part in self.layout.parts if f"{module}.{part}" in self.folder.tensors]

    def _packed(self, module: str, tensors: dict[str, torch.Tensor], grid: Grid) -> torch.Tensor:
        """The bytes of some rows, from which the very tensors come again.

        Raises:
            ValueError: for numbers that are none, and tensors with more in them than a weight.
        """
        try:
            weight = self.layout.weight(tensors, grid)
            for values in (weight.scale, weight.zero):
                if values is not None and not torch.isfinite(values).all():
                    raise ValueError("it holds NaN or infinity: the file is broken")
            again = self.layout.tensors(weight)
            wrong = [part for part, value in tensors.items() if not _same_bytes(value, again[part])]
            if wrong:
                raise ValueError(f"{wrong[0]} holds bits that belong to no weight: the file is broken")
        except ValueError as error:
            raise ValueError(f"{self.folder.path} cannot be opened: {module}: {error}.") from None
        return AFFINE.pack(weight)

    def put(self, name: str, device: torch.device | str) -> None:
        """Read a tensor that is not quantized into the model."""
        value = self.folder.read(name).to(device, self.dtype)
        for tied in [other for other, own in self.state.items() if own is self.state[name]]:
            replace_tensor(self.model, tied, lambda _: value)
            self.origin.checksums[tied] = weight_checksum(value)


def _empty(grid: Grid, rows: int, columns: int) -> QuantizedWeight:
    """A weight without numbers, on the meta device."""
    scale = torch.empty(rows, columns // grid.group_size, device="meta")
    zero = None if grid.zero_point == "none" else scale
    return QuantizedWeight(torch.empty(rows, columns, dtype=torch.int8, device="meta"), scale, zero, grid)


def _of_rows(value: torch.Tensor, dim: int, start: int, stop: int, rows: int) -> torch.Tensor:
    """What a tensor holds of some rows of a weight; packed along them or not, a multiple of 32 begins a word."""
    size = value.shape[dim]
    first, last = start * size // rows, stop * size // rows
    return value.narrow(dim, first, last - first)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = (value.flatten().view(torch.uint8) for value in (one, other))
    return torch.equal(one, other)
