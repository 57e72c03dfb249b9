"""The files of an exported folder: whole or not there, tensors in shards, and what the base model has beside them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

# By which an exported folder is known.
MANIFEST = "dlqat_export.json"

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
# What a model's folder holds beside weights and config that another engine may need.
COMPANIONS = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)


def check_free(out_dir: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something; with `overwrite` one that holds anything but an export.

    Raises:
        FileExistsError: naming what is in the way.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    exported = (out_dir / MANIFEST).is_file()
    if not (overwrite and exported):
        remedy = ", or pass overwrite=True" if exported else "; overwrite=True only replaces what was exported before"
        raise FileExistsError(f"out_dir={str(out_dir)!r} exists and is not empty; name a new folder{remedy}.")


@contextmanager
def whole_or_nothing(out_dir: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `out_dir` at the end; after an exception it is gone.

    It lies beside `out_dir`, on the same disk, so that the last step is a rename.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as room:
        made = Path(room) / "new"
        made.mkdir()
        yield made
        old = Path(room) / "old"
        if out_dir.exists():
            os.rename(out_dir, old)
        try:
            os.rename(made, out_dir)
        except OSError:
            if old.exists():
                os.rename(old, out_dir)
            raise


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
        save_file(self._held, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._held)))
        self._held, self._size = {}, 0


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def companion_folder(base: str, revision: str | None) -> Path | None:
    """The base model's folder, a hub id's files downloaded; None where there is neither."""
    if not base:
        return None
    if Path(base).is_dir():
        return Path(base)
    patterns = [*COMPANIONS, "config.json", "README.md"]
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except Exception:  # no connection, no such repository: the caller says what is missing
        return None


def copy_companions(source: Path, folder: Path, tokenizer: bool) -> list[str]:
    """Copy generation config and licence, and tokenizer and chat template if wanted; returns the files' names."""
    patterns = [pattern for pattern in COMPANIONS if tokenizer or pattern not in TOKENIZER_FILES]
    found = sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]
