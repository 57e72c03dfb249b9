"""Safetensors files in a folder, in shards, and JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..files import save_tensors


class TensorFiles:
    """Safetensors files in a folder, written as tensors come; `close` names them as transformers expects."""

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self._folder, self._limit = folder, max_shard_size
        self._held: dict[str, torch.Tensor] = {}
        self._size = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Hold one tensor, and write those held when they are many."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._size + size > self._limit:
            self._write()
        self._held[name] = tensor.contiguous()
        self._size += size
        self._total += size

    def close(self) -> None:
        """Write the rest, and the index if there are several files."""
        if self._held:
            self._write()
        count = len(self._shards)
        weight_map = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self._folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        path = self._folder / f"shard-{len(self._shards)}"
        save_tensors(self._held, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._held)))
        self._held, self._size = {}, 0


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
