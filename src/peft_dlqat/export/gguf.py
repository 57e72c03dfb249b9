"""GGUF, for llama.cpp, Ollama and whatever is built on them; transformers reads it too (`gguf_file=`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats import RULES, BlockType, block_type
from ..quant.quantizer import QuantizedWeight
from .fitting import check_finite, fitted, fitting_grid
from .gguf_model import Architecture, architecture, rope_factors, write_metadata
from .gguf_vocab import write_vocab
from .hf import write_config
from .options import Options
from .source import Entry, Source

FILE = "model.gguf"
_RULE = RULES["gguf"]
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


def write(source: Source, folder: Path, options: Options) -> None:
    """Write one file with metadata, tokenizer and tensors, and beside it the config that transformers may want."""
    import gguf

    arch = architecture(source.config)
    names = arch.tensor_names(source)
    planned = {entry.name: _plan(entry, source, options) for entry in source.entries}
    with closing(gguf.GGUFWriter(path=None, arch=arch.name)) as writer:
        write_metadata(writer, source.config, arch, Path(source.base).name or arch.name)
        writer.add_file_type(_file_type(planned))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        options.notes += write_vocab(writer, folder, source.config)
        options.notes += arch.notes(source.config)
        factors = rope_factors(source.config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for entry in source.entries:
            _announce(writer, names[entry.name], entry, planned[entry.name])
        writer.write_header_to_file(folder / FILE)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for data in _data(source, arch, planned, options):
            writer.write_tensor_data(data)
    write_config(source, folder, options.dtype)


def _plan(entry: Entry, source: Source, options: Options) -> str | BlockType:
    """The type in which a tensor is stored."""
    grid = None if entry.grid is None else fitting_grid(entry, _RULE)
    if grid is not None:
        chosen = block_type(grid)
        assert chosen is not None
        return chosen
    if len(entry.shape) == 1:
        return "F32"  # llama.cpp adds and multiplies by vectors in float32 only
    if entry.name in _ends(source):
        name = _FLOATS[options.embeddings]
        return name if name != "Q8_0" or entry.shape[-1] % 32 == 0 else "F16"
    return _FLOATS[str(options.dtype).removeprefix("torch.")]


def _ends(source: Source) -> tuple[str, str]:
    """The tensors to which `embeddings` applies."""
    return source.embedding, f"{source.head}.weight"


def _shape(entry: Entry) -> tuple[int, ...]:
    return entry.shape[::-1] if entry.transposed else entry.shape


def _announce(writer: Any, name: str, entry: Entry, plan: str | BlockType) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[plan if isinstance(plan, str) else plan.name]
    shape = _shape(entry)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), raw_dtype=kind)


def rounded(value: torch.Tensor, entry: Entry, source: Source, options: Options) -> torch.Tensor:
    """A tensor as the model keeps it, with the numbers that the file has of it."""
    value = value.t() if entry.grid is not None and entry.transposed else value
    plan = _plan(entry, source, options)
    assert isinstance(plan, str)
    return _decoded(_float_bytes(value, plan), plan)


def _data(
    source: Source, arch: Architecture, planned: dict[str, str | BlockType], options: Options
) -> Iterator[np.ndarray]:
    """The bytes of each tensor, its rows in the order that the architecture wants."""
    for entry, value in fitted(source, _RULE, options):
        order = arch.row_order(entry.name, source.config, _shape(entry)[0])
        plan = planned[entry.name]
        if isinstance(value, QuantizedWeight):
            assert isinstance(plan, BlockType)
            zero = None if value.zero is None else value.zero[order]
            yield plan.pack(value.codes[order], value.scale[order], zero, value.grid)
        else:
            dense = value.t() if entry.transposed and entry.grid is None else value
            assert isinstance(plan, str)
            dense = arch.adjusted(entry.name, dense[order])
            data = _float_bytes(dense, plan)
            held = _decoded(data, plan)
            setting = "embeddings" if entry.name in _ends(source) else "dtype"
            check_finite(entry.name, dense, held, plan, f"pass {setting}='bfloat16' or 'float32'")
            if not torch.equal(held, dense.float()):
                options.rounded.append(entry.name)
            yield data


def _float_bytes(value: torch.Tensor, kind: str) -> np.ndarray:
    import gguf

    value = value.contiguous()
    if kind == "F32":
        return value.float().numpy()
    if kind == "F16":
        return value.to(torch.float16).numpy()
    if kind == "BF16":
        return value.to(torch.bfloat16).view(torch.uint8).numpy()
    return gguf.quantize(value.float().numpy(), gguf.GGMLQuantizationType[kind])


def _decoded(data: np.ndarray, kind: str) -> torch.Tensor:
    import gguf

    return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))


def _file_type(planned: dict[str, str | BlockType]) -> int:
    """llama.cpp's name for the file: that of the commonest type."""
    import gguf

    counts = Counter(plan.name if isinstance(plan, BlockType) else plan for plan in planned.values())
    for name, _ in counts.most_common():
        found = getattr(gguf.LlamaFileType, f"MOSTLY_{name}", None)
        if found is not None:
            return int(found)
    return int(gguf.LlamaFileType.ALL_F32)
