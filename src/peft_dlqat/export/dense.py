"""Merged weights in one dtype, for any engine."""

from __future__ import annotations

from pathlib import Path

from ..formats import RULES
from ..quant.quantizer import QuantizedWeight
from .fitting import fitted
from .folder import TensorFiles
from .hf import as_dense, write_config
from .options import Options
from .source import Source


def write(source: Source, folder: Path, options: Options) -> None:
    """Write a plain transformers model."""
    files = TensorFiles(folder, options.max_shard_size)
    for entry, value in fitted(source, RULES["dense"], options):
        dense = value.dequantize() if isinstance(value, QuantizedWeight) else value
        files.add(entry.name, as_dense(dense, entry, options))
    files.close()
    write_config(source, folder, options.dtype)
