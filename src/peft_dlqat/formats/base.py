"""What a format is: one object says all there is to know of it, from the grids that it holds to what runs it."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..quant.grid import SCALE_DTYPES, Grid
from ..quant.quantizer import QuantizedWeight
from ..quant.super_blocks import K_QUANTS, SUPER_BLOCK
from .engines import Engine
from .layout import Layout
from .presets import Preset
from .q8_0 import Q8_0_BLOCK, held_q8_0
from .tensor_files import TensorFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .origin import Origin

# Bits a number of the types that dense tensors may have.
DENSE_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "q8_0": 8.5}
# Bits a weight that a file may have more than the grid, before a word is said of it.
_UNWORTHY = 0.25
# Numbers that are looked at together, where many would be looked at in vain.
_PIECE = 2**20
# Scales that a format keeps as float16. A bfloat16 has fewer digits, and so is exact from 2**-17 up; `Format.fit`
# checks every scale.
IN_FLOAT16 = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the model that is exported.

    Attributes:
        name: its name in the base model.
        shape: its shape there.
        dtype: its dtype there.
        grid: the grid of an adapted weight; None for all other tensors.
        transposed: whether the model keeps the weight as [in, out] (Conv1D).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    grid: Grid | None = None
    transposed: bool = False

    @property
    def module(self) -> str:
        """The module whose weight it is."""
        return self.name.removesuffix(".weight")

    @property
    def out_in(self) -> tuple[int, int]:
        """Outputs and inputs of a linear layer's weight."""
        first, second = self.shape[0], self.shape[-1]
        return (second, first) if self.transposed else (first, second)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in a file that has outputs as rows."""
        return self.shape[::-1] if self.transposed else self.shape

    def dense(self, value: torch.Tensor | QuantizedWeight) -> torch.Tensor:
        """The tensor as the model keeps it; an adapted weight [out, in] merged, in float32."""
        if isinstance(value, torch.Tensor):
            return value
        return value.dequantize().t() if self.transposed else value.dequantize()


@dataclass(frozen=True)
class Outline:
    """What an exported folder is to hold, before any tensor is read.

    Attributes:
        name: of the base model; "" where it has none.
        config: the model's config.
        tensors: all tensors, in the order in which they come.
        linears: modules that are linear layers, the output head included.
        embedding: name of the token embedding's weight.
        head: the output head's module; "" where the model has none.
        dtype: of the tensors that stay dense.
        embeddings: type of the embedding and the output head, one of `Format.embedding_types`; "" for `dtype`.
        max_shard_size: bytes after which a new safetensors file is begun, and so the memory that writing takes.
        narrow: by name, the type of a dense tensor that a narrower one than `dtype` holds exactly.
        origin: the quantized file that the model was opened from, if any.
    """

    name: str
    config: PretrainedConfig
    tensors: tuple[TensorInfo, ...]
    linears: list[str]
    embedding: str
    head: str
    dtype: torch.dtype
    embeddings: str
    max_shard_size: int
    narrow: Mapping[str, str] = field(default_factory=dict)
    origin: Origin | None = None

    @cached_property
    def adapted(self) -> dict[str, Grid]:
        """The grid that each adapted weight was trained on, by the tensor's name."""
        return {tensor.name: tensor.grid for tensor in self.tensors if tensor.grid is not None}

    @property
    def bits_per_weight(self) -> float:
        """Of the adapted weights on the grids that they were trained on, scales and zeros included."""
        sizes = {tensor.name: math.prod(tensor.shape) for tensor in self.tensors if tensor.grid is not None}
        return sum(sizes[name] * grid.bits_per_weight() for name, grid in self.adapted.items()) / sum(sizes.values())

    def setting(self, tensor: TensorInfo) -> tuple[str, str]:
        """The argument of `export_model` that says how a dense tensor is stored, and what it says."""
        if self.embeddings and tensor.name in (self.embedding, f"{self.head}.weight"):
            return "embeddings", self.embeddings
        return "dtype", self.narrow.get(tensor.name, str(self.dtype).removeprefix("torch."))


# Writes one tensor: an adapted weight on the grid of `Format.grids`, or a dense tensor as `Format.rounded` gives it.
Add = Callable[[TensorInfo, torch.Tensor | QuantizedWeight], None]


class Format(ABC):
    """A format. A group_size of -1 stands for one scale a row, of a length that is not known yet.

    A format that packs weights into safetensors files says `holds`, `stored_as`, `tensors` and `config`; another kind
    of file is written by its own `writing`.

    Attributes:
        name: its name.
        package: the distribution that writing it imports; "" where nothing is needed.
        minimum: the oldest version of the package that writes the format as its readers expect it; "" for any.
        extra: this package's extra that installs it.
        multiple: what the out and in features of a layer must be multiples of.
        packs_conv1d: whether Conv1D layers, whose weight the model keeps as [in, out], can be stored.
        narrow_types: types that a dense tensor may have where they hold it exactly, the first choice first.
        embedding_types: what `embeddings` may be; empty where embedding and head have the dtype of all dense tensors.
        remark: what the table of formats adds to each line; "" for nothing.
        files: pattern of the files that hold the weights.
        library: `library_name` of the model card.
        usage: how to load it, in Markdown, of a repository called THIS_REPOSITORY.
        engines: what runs it here.
        presets: settings for engines, on which `DLQATConfig.for_engine` draws; the first of so many bits first.
    """

    name: str
    package: str = ""
    minimum: str = ""
    extra: str = ""
    multiple: int = 1
    packs_conv1d: bool = False
    narrow_types: tuple[str, ...] = ("bfloat16", "float16")
    embedding_types: tuple[str, ...] = ()
    remark: str = ""
    files: str = "*.safetensors"
    library: str = "transformers"
    usage: str
    engines: tuple[Engine, ...] = ()
    presets: tuple[Preset, ...] = ()

    def check_installed(self) -> None:
        """Refuse to begin without the package that writing needs.

        Raises:
            ImportError: if it is missing or too old; names the extra.
        """
        if not self.package:
            return
        from packaging.version import Version

        install = f"install it by pip install 'peft-dlqat[{self.extra}]'" if self.extra else "install it"
        if importlib.util.find_spec(self.package.replace("-", "_")) is None:
            raise ImportError(f"format={self.name!r} needs the package {self.package}; {install}.")
        if self.minimum and Version(found := version(self.package)) < Version(self.minimum):
            raise ImportError(
                f"{self.package} {found} is installed, but format={self.name!r} needs {self.minimum} or newer, since "
                f"older versions write it otherwise; {install}."
            )

    @abstractmethod
    def holds(self, grid: Grid) -> bool:
        """Whether every weight of the grid can be stored exactly."""

    @abstractmethod
    def stored_as(self, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
        """The type in which a weight of a grid that is held is stored, and its bits a weight, all told.

        Args:
            grid: the grid.
            dtype: that of dense tensors, for a format that stores the merged weight.
        """

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """The dtype in which the file keeps scales and offsets."""
        return grid.scale_dtype

    def problem(self, grid: Grid, shape: tuple[int, int] | None = None, conv1d: bool = False) -> str:
        """Why a weight cannot be held and what to change, or "".

        Args:
            grid: its grid.
            shape: [out, in], where one layer is meant.
            conv1d: whether it is a Conv1D layer's.
        """
        if conv1d and not self.packs_conv1d:
            return (
                f"{self.name} cannot pack Conv1D layers, whose weights are kept as [in, out]; leave them out of "
                "target_modules, or choose another format"
            )
        if shape is not None and any(features % self.multiple for features in shape):
            return (
                f"{self.name} cannot pack a weight of {shape[0]} x {shape[1]}, since both must be multiples of "
                f"{self.multiple}; leave the layer out of target_modules, or choose another format"
            )
        if self.holds(grid):
            return ""
        remedies = [
            " and ".join(f"{name}={value!r}" for name, value in change.items())
            for change in _remedies(grid, self, None if shape is None else shape[1])
        ]
        remedy = f"use {' or '.join(remedies)}" if remedies else "choose another format, or leave the layer out"
        return f"{self.name} cannot hold {describe(grid)} exactly; {remedy}"

    def advice(self, grid: Grid, in_features: int | None = None) -> str:
        """What to change where a grid that is held is stored in more bits a weight than it has; "" where it is not.

        The fewest changes that lead to a grid of as many bits, or else of more, which is stored in its own bits, in no
        more than this one is stored in now.

        Args:
            grid: the grid.
            in_features: what the rows of all its layers are multiples of, where that is known.
        """
        stored = self.stored_as(grid)[1]
        if stored - own_bits(grid) <= _UNWORTHY:
            return ""
        found = []
        for changes, other in _variants(grid, in_features):
            if self.holds(other) and (takes := self.stored_as(other)[1]) <= stored:
                more = takes - own_bits(other)
                if more <= _UNWORTHY:
                    found.append((other.bits, len(changes), round(more, 2), takes, as_settings(changes)))
        if not found:
            return ""
        *_, takes, settings = min(found)
        return f"{settings} takes {takes:.2f}"

    def advice_for(self, outline: Outline) -> str:
        """As `advice`, for the grids of a model: for the first that there is something to say of."""
        common = math.gcd(*(tensor.out_in[1] for tensor in outline.tensors if tensor.grid is not None))
        kinds = Counter(outline.adapted.values()).most_common()
        return next(filter(None, (self.advice(grid, common) for grid, _ in kinds)), "")

    def check_model(self, outline: Outline) -> None:
        """Refuse a model that the format cannot describe as it is, before anything is computed.

        Raises:
            ValueError: naming what it cannot say, and what to do.
        """
        return

    def with_template(
        self, template: str | Path, outline: Outline, weights: Iterable[tuple[TensorInfo, torch.Tensor, bool]]
    ) -> Format:
        """The same format as a file of the same base model has it; arguments as `gguf_template.GGUFTemplate`.

        Raises:
            ValueError: for a format that has no templates, or a file of another model.
        """
        raise ValueError(
            f"template={str(template)!r} has no meaning in format={self.name!r}, which says all that config.json "
            "says; leave it out, or use format='gguf'."
        )

    def grids(self, outline: Outline) -> dict[str, Grid]:
        """The grid on which each adapted weight is written, by the tensor's name: every value of its own is on it."""
        return outline.adapted

    def fit(self, tensor: TensorInfo, weight: QuantizedWeight, grid: Grid) -> torch.Tensor | QuantizedWeight:
        """The very weight as the file keeps it: on the grid of `grids`, or merged where a format has no codes.

        Raises:
            ValueError: for a scale or offset that is not exact in the file's dtype.
        """
        weight = _on_grid(_without_dead_scales(weight), grid)
        dtype = self.scale_dtype(grid)
        for values in (weight.scale, weight.zero if grid.zero_point == "float" else None):
            if values is not None and (wrong := values.to(dtype).float() != values).any():
                raise ValueError(
                    f"{tensor.name}: a scale or offset of {values[wrong][0].item():.6g} has no exact "
                    f"{str(dtype).removeprefix('torch.')}, in which {self.name} keeps it; train with "
                    "scale_dtype='float16', or choose another format."
                )
        return weight

    def dense_type(self, outline: Outline, tensor: TensorInfo) -> str:
        """The type in which a tensor without codes is stored."""
        return outline.setting(tensor)[1]

    def rounded(self, outline: Outline, tensor: TensorInfo, value: torch.Tensor) -> torch.Tensor:
        """A tensor without codes with the numbers that the file has of it, in the model's order of dimensions."""
        return value.to(getattr(torch, self.dense_type(outline, tensor))) if value.is_floating_point() else value

    def narrowed(self, outline: Outline, dense: Iterable[tuple[TensorInfo, torch.Tensor]]) -> Outline:
        """The outline with each dense tensor in the narrowest type that holds it exactly, `dtype` at the widest.

        A base of 16 bits that was loaded in float32 gives its own 16 bits again, and one that came from a file with
        blocks of Q8_0 gives these.

        Args:
            outline: what will be written.
            dense: tensors without codes; those that are not here keep their type.
        """
        narrow = {}
        for tensor, value in dense:
            argument, widest = outline.setting(tensor)
            here = not value.is_meta and tuple(value.shape) == tensor.shape  # ZeRO-3 leaves an empty one
            if argument == "embeddings" or not value.is_floating_point() or not here:
                continue
            for kind in self.narrow_types:
                if DENSE_BITS[kind] < DENSE_BITS[widest] and is_exact(tensor, value, kind):
                    narrow[tensor.name] = kind
                    break
        return replace(outline, narrow=narrow)

    def size(self, outline: Outline) -> int:
        """Bytes of the files of weights that `writing` makes, to within 2 %."""
        grids = self.grids(outline)
        weights = sum(
            self.dense_bytes(outline, tensor)
            if tensor.grid is None
            else self.weight_bytes(tensor, grids[tensor.name], outline.dtype)
            for tensor in outline.tensors
        )
        return round(weights) + self.header_bytes(outline)

    def weight_bytes(self, tensor: TensorInfo, grid: Grid, dtype: torch.dtype) -> float:
        """Bytes of an adapted weight, on the grid that it is written on; `dtype` as in `stored_as`."""
        return math.prod(tensor.shape) * self.stored_as(grid, dtype)[1] / 8

    def dense_bytes(self, outline: Outline, tensor: TensorInfo) -> float:
        """Bytes of a tensor without codes."""
        bits = DENSE_BITS[self.dense_type(outline, tensor)] if tensor.dtype.is_floating_point else 0
        return math.prod(tensor.shape) * (bits / 8 or tensor.dtype.itemsize)

    def header_bytes(self, outline: Outline) -> int:
        """About the bytes of what else is in the files: of safetensors the names, an adapted weight being several."""
        return sum((len(tensor.name) + 85) * (1 if tensor.grid is None else 3) for tensor in outline.tensors)

    def tensors(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """What safetensors files hold of one adapted weight, by names within its module."""
        raise NotImplementedError(f"{self.name} keeps no codes in safetensors files.")

    def layout(self, section: Mapping[str, Any]) -> Layout | None:
        """How a folder keeps its weights whose config.json has this section on quantization; None for another format.

        Raises:
            ValueError: for a section of this format that cannot be opened.
        """
        return None

    def config(self, outline: Outline) -> dict[str, Any]:
        """The sections that config.json gets, such as `quantization_config`."""
        return {}

    def json_files(self, outline: Outline) -> dict[str, dict[str, Any]]:
        """The JSON files beside the weights, by name."""
        content = {key: _plain(value) for key, value in outline.config.to_dict().items() if key != "_name_or_path"}
        return {"config.json": content | self.config(outline)}

    @contextmanager
    def writing(self, folder: Path, outline: Outline, notes: list[str]) -> Iterator[Add]:
        """Inside the block, call what it gives with every tensor of the outline, in order; at its end all is written.

        Args:
            folder: holds the tokenizer's files, and gets the weights.
            outline: what will come.
            notes: gets what the user should know.
        """
        files = TensorFiles(folder, outline.max_shard_size)

        def add(tensor: TensorInfo, value: torch.Tensor | QuantizedWeight) -> None:
            if isinstance(value, torch.Tensor):
                files.add(tensor.name, value)
                return
            for name, packed in self.tensors(value).items():
                files.add(f"{tensor.module}.{name}", packed)

        yield add
        files.close()


def is_exact(tensor: TensorInfo, value: torch.Tensor, kind: str) -> bool:
    """Whether a type of `DENSE_BITS` holds a tensor without codes exactly."""
    if kind == "q8_0" and (value.dim() != 2 or value.shape[-1] % Q8_0_BLOCK or tensor.transposed):
        return False
    rows = value.flatten(0, -2) if value.dim() > 1 else value.unsqueeze(0)
    return all(
        torch.equal(held_q8_0(piece) if kind == "q8_0" else piece.to(getattr(torch, kind)).to(piece.dtype), piece)
        for piece in rows.split(max(1, _PIECE // max(1, rows.shape[-1])))
    )


def per_group(grid: Grid, bits: int) -> float:
    """A weight's share of `bits` bits a group; one a row counts as nothing."""
    return 0.0 if grid.group_size == -1 else bits / grid.group_size


def describe(grid: Grid) -> str:
    """The grid as the settings that make it."""
    return as_settings(settings_of(grid))


def own_bits(grid: Grid) -> float:
    """Bits a weight of a grid; scales of rows of any length count as nothing."""
    return float(grid.bits) if grid.group_size == -1 else grid.bits_per_weight()


def _variants(grid: Grid, in_features: int | None) -> Iterator[tuple[dict[str, Any], Grid]]:
    """Grids of as many bits or more, K-quants among them, each with the settings to change for it."""
    own = settings_of(grid)
    sizes = dict.fromkeys([grid.group_size, 128, 64, 32])
    dtypes = [name for name in SCALE_DTYPES if name != "k_quant"]
    choices = list(product(range(grid.bits, 9), ("none", "integer", "float"), sizes, dtypes))
    quants = K_QUANTS.values() if in_features is None or in_features % SUPER_BLOCK == 0 else ()
    choices += [(quant.bits, quant.zero_point, quant.group_size, "k_quant") for quant in quants]
    for bits, zero_point, size, scales in choices:
        if bits >= grid.bits and (in_features is None or size == -1 or in_features % size == 0):
            other = Grid(bits, size, zero_point, SCALE_DTYPES[scales], scales == "k_quant")  # type: ignore[arg-type]
            yield {name: value for name, value in settings_of(other).items() if value != own[name]}, other


def settings_of(grid: Grid) -> dict[str, Any]:
    """The settings of `DLQATConfig` that make a grid."""
    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": grid.zero_point,
        "scale_dtype": grid.scale_name,
    }


def as_settings(changes: Mapping[str, Any]) -> str:
    """Settings as a user writes them."""
    return ", ".join(f"{name}={value!r}" for name, value in changes.items())


def _remedies(grid: Grid, format: Format, in_features: int | None) -> Iterator[dict[str, Any]]:
    """The smallest changes of settings that make a grid one that is held: of one setting, else of two and so on."""
    near = sorted(range(2, 9), key=lambda bits: (abs(bits - grid.bits), bits))
    choices: dict[str, tuple[Any, ...]] = {
        "zero_point": ("integer", "none", "float"),
        "scale_dtype": tuple(name for name in SCALE_DTYPES if name != "k_quant"),
        "group_size": tuple(size for size in (32, 64, 128) if in_features is None or in_features % size == 0),
        "bits": tuple(near),
    }

    def held(change: Mapping[str, Any]) -> bool:
        values: dict[str, Any] = dict(change)
        if "scale_dtype" in values:
            values |= {"scale_dtype": SCALE_DTYPES[values["scale_dtype"]], "k_quant": False}
        elif grid.k_quant:  # of whose settings none can be changed alone
            return False
        return format.holds(replace(grid, **values))

    for count in range(1, len(choices) + 1):
        found = False
        for names in combinations(choices, count):
            values = product(*(choices[name] for name in names))
            changes = (dict(zip(names, chosen, strict=True)) for chosen in values)
            if change := next(filter(held, changes), None):
                found = True
                yield change
        if found:
            return


def _without_dead_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """A group of zeros is zero by any scale: 1 fits every dtype. In a K-quant, others hang on it."""
    if weight.grid.zero_point == "float" or weight.grid.k_quant:
        return weight
    codes = weight.grid.group(weight.codes)
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    dead = (codes == zero.unsqueeze(-1)).all(-1)
    return replace(weight, scale=torch.where(dead, 1.0, weight.scale)) if dead.any() else weight


def _on_grid(weight: QuantizedWeight, grid: Grid) -> QuantizedWeight:
    """The same weight on a wider grid of smaller groups: the same codes and zero points, the same scale more often."""
    if grid == weight.grid:
        return weight
    times = weight.grid.group_size // grid.group_size
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    scale, zero = (values.repeat_interleave(times, -1) for values in (weight.scale, zero))
    return QuantizedWeight(weight.codes, scale, zero, grid)


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
