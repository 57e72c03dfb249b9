"""GGUF, for llama.cpp, Ollama and whatever is built on them; transformers reads it too (`gguf_file=`).

One file of metadata (`gguf_metadata`), tokenizer (`gguf_vocab`) and tensors, whose weights are sequences of blocks
(`gguf_blocks`, `gguf_k_quants`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight
from . import llama_cpp
from .base import DENSE_BITS, IN_FLOAT16, Add, Format, Outline, TensorInfo
from .engines import Engine, float32_logits
from .gguf_blocks import BlockType, Signed, Ternary, Unsigned
from .gguf_checks import check_config
from .gguf_file import FILE, GGUFFile
from .gguf_k_quants import K_QUANT_TYPES
from .gguf_metadata import ARCHITECTURES, architecture, rope_factors, write_metadata
from .gguf_vocab import write_sampling, write_vocab
from .presets import Preset
from .q8_0 import encode_q8_0

# A new type is one entry.
BLOCK_TYPES: tuple[BlockType, ...] = (
    Ternary("TQ2_0", 2, 2.0625, 256),
    Signed("Q4_0", 4, 4.5, 32),
    Signed("Q5_0", 5, 5.5, 32),
    Signed("Q8_0", 8, 8.5, 32),
    Unsigned("Q4_1", 4, 5.0, 32),
    Unsigned("Q5_1", 5, 6.0, 32),
    *K_QUANT_TYPES.values(),
)
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_EMBEDDINGS = {"embeddings": "q8_0"}  # of the presets
# What a token of the vocabulary takes, with its share of the merges: 36 bytes of SmolLM2's.
_TOKEN_BYTES = 36


def block_type(grid: Grid) -> BlockType:
    """The smallest type that holds a grid exactly, where one does."""
    return min((kind for kind in BLOCK_TYPES if kind.holds(grid)), key=lambda kind: kind.bits_per_weight)


def _transformers(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "mistral":  # it goes by the names of llama.cpp's architectures, where Mistral is a Llama
        content = config.to_dict()
        config = LlamaConfig.from_dict(
            {key: value for key, value in content.items() if key not in ("model_type", "sliding_window")}
        )
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, config=config, dtype=torch.float32)
    for parameter in model.parameters():  # Conv1D's come out of a GGUF transposed, and may round differently so
        parameter.data = parameter.data.contiguous()
    return float32_logits(model, ids)


def _transformers_knows(folder: Path) -> bool:
    """Its loader lacks some of llama.cpp's architectures."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    return kind in ARCHITECTURES and ARCHITECTURES[kind].name in GGUF_SUPPORTED_ARCHITECTURES


class GGUF(Format):
    """What a block type holds, with scales that fit float16 or are a K-quant's own."""

    name = "gguf"
    package = "gguf"
    extra = "gguf"
    packs_conv1d = True
    narrow_types = ("q8_0", "float16", "bfloat16")  # more kernels read float16
    embedding_types = tuple(_FLOATS)
    files = "*.gguf"
    library = "gguf"
    engines = (
        Engine("transformers", "transformers", _transformers, knows=_transformers_knows),
        Engine(
            "llama.cpp",
            "xllamacpp",
            lambda folder, ids: llama_cpp.logits(folder / FILE, ids, as_float32=True),
            largest_kl=1e-8,
            largest_difference=1e-4,
            gelu=llama_cpp.half_gelu,
            served=lambda folder, ids: llama_cpp.logits(folder / FILE, ids, as_float32=False),
        ),
    )
    presets = (
        *(Preset("llama.cpp", {**kind.quant.settings, **_EMBEDDINGS}, kind.name) for kind in K_QUANT_TYPES.values()),
        # The file keeps these scales in float16, too.
        *(
            Preset(
                "llama.cpp",
                {"bits": bits, "zero_point": zero_point, "group_size": 32, "scale_dtype": "float16", **_EMBEDDINGS},
                name,
            )
            for name, bits, zero_point in (
                ("Q4_0", 4, "none"),
                ("Q4_1", 4, "float"),
                ("Q5_0", 5, "none"),
                ("Q5_1", 5, "float"),
                ("Q8_0", 8, "none"),
            )
        ),
    )
    usage = """\
```bash
llama-cli -hf THIS_REPOSITORY
```"""

    def holds(self, grid: Grid) -> bool:
        """As the class says."""
        return (grid.k_quant or grid.scale_dtype in IN_FLOAT16) and any(kind.holds(grid) for kind in BLOCK_TYPES)

    def stored_as(self, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
        """The smallest block type."""
        chosen = block_type(grid)
        return chosen.name, chosen.bits_per_weight

    def scale_dtype(self, grid: Grid) -> torch.dtype:
        """float16; a K-quant's scale is an integer times one."""
        return torch.float32 if grid.k_quant else torch.float16

    def dense_type(self, outline: Outline, tensor: TensorInfo) -> str:
        """A GGML type: F32 for vectors, by which llama.cpp adds and multiplies in float32 only."""
        name = "F32" if len(tensor.shape) == 1 else _FLOATS[super().dense_type(outline, tensor)]
        return name if name != "Q8_0" or tensor.shape[-1] % 32 == 0 else "F16"

    def dense_bytes(self, outline: Outline, tensor: TensorInfo) -> float:
        """In a GGML type."""
        names = {kind: name for name, kind in _FLOATS.items()}
        return math.prod(tensor.shape) * DENSE_BITS[names[self.dense_type(outline, tensor)]] / 8

    def header_bytes(self, outline: Outline) -> int:
        """Metadata, the vocabulary, and what names and aligns each tensor."""
        vocabulary = outline.config.get_text_config().vocab_size * _TOKEN_BYTES
        return 2000 + vocabulary + sum(len(tensor.name) + 55 for tensor in outline.tensors)

    def rounded(self, outline: Outline, tensor: TensorInfo, value: torch.Tensor) -> torch.Tensor:
        """Through the type's bytes and back."""
        import gguf

        kind = self.dense_type(outline, tensor)
        return torch.from_numpy(gguf.dequantize(float_bytes(value, kind), gguf.GGMLQuantizationType[kind]))

    def with_template(
        self, template: str | Path, outline: Outline, weights: Iterable[tuple[TensorInfo, torch.Tensor, bool]]
    ) -> Format:
        """See `gguf_template`."""
        from .gguf_template import GGUFTemplate

        return GGUFTemplate(GGUFFile.open(template), outline, weights)

    def check_model(self, outline: Outline) -> None:
        """Refuse an architecture, tensors or settings that llama.cpp does not know."""
        check_config(outline.config)
        architecture(outline.config).tensor_names(outline.config, [tensor.name for tensor in outline.tensors])

    @contextmanager
    def writing(self, folder: Path, outline: Outline, notes: list[str]) -> Iterator[Add]:
        """One file, whose header names all tensors."""
        import gguf

        config, arch = outline.config, architecture(outline.config)
        names = arch.tensor_names(config, [tensor.name for tensor in outline.tensors])
        types = {tensor.name: self._type(outline, tensor) for tensor in outline.tensors}
        with closing(gguf.GGUFWriter(path=None, arch=arch.name)) as writer:
            weights = sum(math.prod(tensor.shape) for tensor in outline.tensors)
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_size_label(gguf.size_label(weights, weights, 0, 0))
            write_metadata(writer, config, arch, outline.name or arch.name)
            write_sampling(writer, folder)
            writer.add_file_type(file_type(types))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            notes += write_vocab(writer, folder, config)
            factors = rope_factors(config)
            if factors is not None:
                writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
            for tensor in outline.tensors:
                _announce(writer, names[tensor.name], tensor, types[tensor.name])
            writer.write_header_to_file(folder / FILE)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)

            def add(tensor: TensorInfo, value: torch.Tensor | QuantizedWeight) -> None:
                order = arch.row_order(tensor.name, config, tensor.stored_shape[0])
                if isinstance(value, QuantizedWeight):
                    writer.write_tensor_data(block_type(value.grid).pack(ordered_rows(value, order)))
                else:
                    rows = (value.t() if tensor.transposed else value)[order]
                    writer.write_tensor_data(float_bytes(arch.adjusted(tensor.name, rows), types[tensor.name]))

            yield add

    def _type(self, outline: Outline, tensor: TensorInfo) -> str:
        """The GGML type in which a tensor is stored."""
        return self.dense_type(outline, tensor) if tensor.grid is None else block_type(tensor.grid).name


def ordered_rows(weight: QuantizedWeight, order: torch.Tensor | slice) -> QuantizedWeight:
    """The same weight with its rows in another order."""
    zero = None if weight.zero is None else weight.zero[order]
    return replace(weight, codes=weight.codes[order], scale=weight.scale[order], zero=zero)


def _announce(writer: Any, name: str, tensor: TensorInfo, type_name: str) -> None:
    import gguf

    kind, shape = gguf.GGMLQuantizationType[type_name], tensor.stored_shape
    if type_name in ("F32", "F16"):
        dtype = np.dtype(np.float32 if type_name == "F32" else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), raw_dtype=kind)


def float_bytes(value: torch.Tensor, kind: str) -> np.ndarray:
    """A dense tensor in one of `_FLOATS`; what Q8_0 has rounded it finds again."""
    value = value.contiguous()
    if kind == "F32":
        return value.float().numpy()
    if kind == "F16":
        return value.to(torch.float16).numpy()
    if kind == "BF16":
        return value.to(torch.bfloat16).view(torch.uint8).numpy()
    return torch.cat([part.view(torch.uint8) for part in encode_q8_0(value)], -1).flatten(-2).numpy()


def file_type(types: dict[str, str]) -> int:
    """llama.cpp's name for the file: that of the commonest type."""
    import gguf

    for name, _ in Counter(types.values()).most_common():
        found = getattr(gguf.LlamaFileType, f"MOSTLY_{name}", None)
        if found is not None:
            return int(found)
    return int(gguf.LlamaFileType.ALL_F32)
