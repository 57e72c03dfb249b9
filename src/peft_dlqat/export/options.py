"""What a format's writer is told beside the tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..quant.grid import Grid


@dataclass
class Options:
    """Choices of one export, and what its writer has to say.

    Attributes:
        dtype: dtype of the tensors that stay dense.
        embeddings: dtype of embeddings and output head in GGUF: "float32", "float16", "bfloat16" or "q8_0".
        lossy: round again what the format cannot hold.
        max_shard_size: bytes after which a new safetensors file is begun, and so the memory that writing takes.
        unpacked: filled by the writer, first: adapted weights of layers that the format's loaders do not pack.
        kept_dense: filled by the writer: adapted weights that the format cannot pack.
        grids: filled by the writer: the grids on which all other adapted weights are written.
        rounded: filled by the writer: dense tensors that `dtype` (or `embeddings`) has rounded.
        rescaled: filled by the writer: adapted weights whose scales or offsets the format's dtype has rounded.
        notes: filled by the writer: what the user should know.
    """

    dtype: torch.dtype
    embeddings: str
    lossy: bool = False
    max_shard_size: int = 2 * 1024**3
    unpacked: set[str] = field(default_factory=set)
    kept_dense: list[str] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)
    rescaled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
