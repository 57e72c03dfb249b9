"""The exported folder: whole or not there, with what the base model has beside its weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

from ..files import unfinished
from ..formats.safetensors_folder import OURS

# By which an exported folder is known.
MANIFEST = f"{OURS}.json"

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

    It lies in `.NAME.unfinished` beside `out_dir`, on the same disk, so that the last step is a rename. What a killed
    run has left there, the next one removes.

    Raises:
        RuntimeError: if another process is writing `out_dir`.
    """
    with unfinished(out_dir) as (room, _):
        made = room / "new"
        made.mkdir()
        yield made
        old = room / "old"
        if out_dir.exists():
            os.rename(out_dir, old)
        try:
            os.rename(made, out_dir)
        except OSError:
            if old.exists():
                os.rename(old, out_dir)
            raise
        shutil.rmtree(room)


def keep_unproven(made: Path, out_dir: Path) -> Path:
    """Put a finished folder beside `out_dir`, whose place it does not get; returns where, OUT_DIR.unproven.

    It replaces one that an export has left there before, and no other.

    Raises:
        FileExistsError: if something else is in the way.
    """
    beside = out_dir.with_name(f"{out_dir.name}.unproven")
    check_free(beside, overwrite=True)
    shutil.rmtree(beside, ignore_errors=True)
    os.rename(made, beside)
    return beside


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


def copy_companions(beside: Path, folder: Path, tokenizer: bool) -> list[str]:
    """Copy generation config and licence, and tokenizer and chat template if wanted; returns the files' names."""
    patterns = [pattern for pattern in COMPANIONS if tokenizer or pattern not in TOKENIZER_FILES]
    found = sorted({path for pattern in patterns for path in beside.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]
