"""What will come out of a model with an adapter: what is quantized, what is not, and how large each file will be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .contents import CHANGED, Contents, tensors_of
from .file_layers import in_file
from .formats import FORMATS, ExpectedFile, TensorInfo, expected_file, writer_of
from .formats.base import as_settings, settings_of
from .formats.expected import megabytes
from .layer import DLQATLayer, adapter_layers
from .placement import is_offloaded, is_sharded
from .quant.grid import Grid
from .quant.lattice import lattice_of, lies_on

# Kinds of grid that are named.
_MOST_GRIDS = 3
# As few numbers of a kind are counted with the rest.
_SMALL = 0.001


@dataclass(frozen=True)
class Summary:
    """What will come out of a model with an adapter; `print` it.

    Attributes:
        adapter_name: the adapter.
        layers: quantized layers.
        linears: linear layers of the model, these among them.
        weights: numbers of the quantized weights.
        bits_per_weight: theirs on average, scales and zeros included.
        grids: their grids, and how many layers have each; the commonest first.
        in_full: numbers that stay in full precision, by what they are; the most first.
        on_grid: layers whose weight lies on scales and zeros of its grid, as quantization-aware training leaves it.
        on_others: other grids of at most 4 bits that weights lie on, and how many layers' do.
        base_size: bytes of the model's tensors as they are.
        files: what each format would make of it; none for a model without an output head, or not of transformers.
    """

    adapter_name: str
    layers: int
    linears: int
    weights: int
    bits_per_weight: float
    grids: dict[Grid, int]
    in_full: dict[str, int]
    on_grid: int
    on_others: dict[Grid, int]
    base_size: int
    files: tuple[ExpectedFile, ...]

    def __str__(self) -> str:
        """A few lines and a table."""
        rest, everything = sum(self.in_full.values()), self.weights + sum(self.in_full.values())
        parts = [f"{what} {_count(count)}" for what, count in self.in_full.items() if count >= _SMALL * everything]
        lines = [
            f"Adapter {self.adapter_name!r}: {self.layers} of {self.linears} linear layers, {_count(self.weights)} "
            f"weights, at {self.bits_per_weight:.2f} bits a weight",
            f"  ({_kinds(self.grids)}).",
            f"In full precision: {rest / max(1, everything):.0%} of the model's numbers"
            + (f" ({', '.join(parts)})." if parts else "."),
        ]
        if self.on_grid:
            lines.append(
                f"{self.on_grid} weights lie on their grid already, as after quantization-aware training: init='mse' "
                "reproduces them, to bfloat16's rounding."
            )
        lines += [
            f"{count} weights lie on a grid already, as after quantization-aware training, but on another: "
            f"{_lattice(grid)} would reproduce them, to bfloat16's rounding."
            for grid, count in self.on_others.items()
        ]
        if self.files:
            lines.append(f"Exported, of {megabytes(self.base_size)} as it is:")
            width = max(len(row.format) for row in self.files)
            lines += [f"  {row.format:<{width}}  {row}" for row in self.files]
        return "\n".join(lines)


def summarize(model: nn.Module, adapter_name: str | None = None, formats: Collection[str] | None = None) -> Summary:
    """Say what will come out of a model with an adapter, before it is trained or after.

    Args:
        model: a model with a DL-QAT adapter. On the meta device, too.
        adapter_name: defaults to the active adapter.
        formats: those to look at; defaults to the config's `export`, or else all.

    Returns:
        A [`Summary`], which `get_peft_model` prints for a model's first adapter.

    Raises:
        ValueError: if the model has no such adapter, or several are active and none is named.
    """
    adapter_name, layers = adapter_layers(model, adapter_name)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    _, layers = adapter_layers(base, adapter_name)  # by the base model's names
    found = tensors_of(base, adapter_name, layers)
    specs = [layer.specs[adapter_name].grid for layer in layers.values()]
    sizes = [layer.out_features * layer.in_features for layer in layers.values()]
    config = getattr(model, "peft_config", {}).get(adapter_name)
    on_grid, on_others = _lattices(layers.values(), adapter_name)
    formats = formats or getattr(config, "export", None) or FORMATS
    # Only what writes text has a vocabulary, and is exported.
    writes = isinstance(base, PreTrainedModel) and base.get_output_embeddings() is not None
    # What is not in memory yet cannot be looked at.
    later = getattr(config, "embeddings", None) if any(tensor.is_meta for tensor in base.parameters()) else None
    files = _files(Contents(base, adapter_name), formats, later or "") if writes else ()
    return Summary(
        adapter_name=adapter_name,
        layers=len(layers),
        linears=len(layers) + sum(_is_plain_linear(base, name, module) for name, module in base.named_modules()),
        weights=sum(sizes),
        bits_per_weight=sum(n * grid.bits_per_weight() for n, grid in zip(sizes, specs, strict=True)) / sum(sizes),
        grids=dict(Counter(specs).most_common()),
        in_full=_in_full(base, found),
        on_grid=on_grid,
        on_others=on_others,
        base_size=_base_size(base, found),
        files=files,
    )


def _base_size(base: nn.Module, found: dict[str, TensorInfo]) -> int:
    """Bytes of the model's tensors, or of the file that it was opened from."""
    if (origin := getattr(base, "origin", None)) is not None:
        return origin.size  # type: ignore[no-any-return]
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in found.values())


def _files(contents: Contents, formats: Iterable[str], embeddings: str) -> tuple[ExpectedFile, ...]:
    """What each format would make of a model; `embeddings` as in `Outline`, for a format that has such."""
    found = []
    for target in (FORMATS[name] for name in formats):
        outline = contents.outline(contents.dtype, embeddings if embeddings in target.embedding_types else "", 0)
        writer = writer_of(target, outline)
        found.append(expected_file(writer, writer.narrowed(outline, contents.dense())))
    return tuple(found)


def _lattices(layers: Iterable[DLQATLayer], adapter_name: str) -> tuple[int, dict[Grid, int]]:
    """How many weights lie on their own grid, and on which others; of those that are in memory as they are."""
    on_grid, others = 0, Counter[Grid]()
    for layer in layers:
        base = layer.get_base_layer()
        if base.weight.is_meta or not base.weight.is_floating_point() or is_offloaded(base) or is_sharded(base):
            continue
        weight = layer.frozen.as_kept()
        if lies_on(weight, layer.specs[adapter_name].grid):
            on_grid += 1
        elif other := lattice_of(weight):
            others[other] += 1
    return on_grid, dict(others.most_common(_MOST_GRIDS))


def _lattice(grid: Grid) -> str:
    """The settings that say on which grid weights lie, whatever their scales' dtype."""
    return as_settings({name: value for name, value in settings_of(grid).items() if name != "scale_dtype"})


def _is_plain_linear(base: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer of its own, no part of an adapter's or of a copy that PEFT trains."""
    inside = ".base_layer" in f".{name}" or ".modules_to_save." in f".{name}"
    return isinstance(module, nn.Linear | Conv1D) and not inside and not isinstance(module, DLQATLayer)


def _in_full(base: nn.Module, found: dict[str, TensorInfo]) -> dict[str, int]:
    """Numbers that stay in full precision, by what they are."""
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    text = language_model(base)
    counts: Counter[str] = Counter()
    for key, tensor in found.items():
        module = base.get_submodule(key.rpartition(".")[0])
        if tensor.grid is None and not (in_file(module) and key.endswith(".weight")):
            changed = f", {text_of}" if (text_of := getattr(module, CHANGED, "")) else ""
            counts[_what(tensor, module, head, text) + changed] += math.prod(tensor.shape)
    return dict(counts.most_common())


def _what(tensor: TensorInfo, module: nn.Module, head: nn.Module | None, text: str) -> str:
    """What a tensor in full precision is, in words."""
    if module is head:
        return "output head"
    if text and not tensor.name.startswith(text):
        parent = text.rstrip(".").rpartition(".")[0]
        return tensor.name.removeprefix(f"{parent}.").partition(".")[0]
    if isinstance(module, nn.Embedding):
        tied = head is not None and getattr(head, "weight", None) is module.weight
        return "embedding and output head" if tied else "embedding"
    if len(tensor.shape) <= 1:
        return "norms and biases"
    if isinstance(module, nn.Linear | Conv1D):
        return "linear layers"
    if isinstance(module, _ConvNd):
        return "convolutions"
    return "experts" if len(tensor.shape) == 3 else "other weights"


def language_model(base: nn.Module) -> str:
    """What names begin with in the language model of a multimodal one, with the dot; "" elsewhere."""
    if not isinstance(base, PreTrainedModel) or base.config.get_text_config() is base.config:
        return ""
    decoder = base.get_decoder()
    return next((f"{name}." for name, module in base.named_modules() if name and module is decoder), "")


def _kinds(grids: dict[Grid, int]) -> str:
    """Grids as settings: what all have in common once, and what is apart with the number of layers."""
    each = [settings_of(grid) for grid in grids]
    apart = {name for name in each[0] if len({str(settings[name]) for settings in each}) > 1}
    parts = [as_settings({name: value for name, value in each[0].items() if name not in apart})]
    for settings, count in list(zip(each, grids.values(), strict=True))[:_MOST_GRIDS] if apart else ():
        own = as_settings({name: value for name, value in settings.items() if name in apart})
        parts.append(f"{own} in {count} layers")
    if len(each) > _MOST_GRIDS:
        parts.append(f"{len(each) - _MOST_GRIDS} kinds more")
    return "; ".join(filter(None, parts))


def _count(number: int) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
