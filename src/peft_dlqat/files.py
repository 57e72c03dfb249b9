"""Files and folders: readable by others as the user has it, and whole or not there, also where a run is killed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as the umask says; safetensors itself makes it the owner's."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    allow(path, mode)


def allow(path: Path, mode: int) -> None:
    """Let those read and write a file whom the bits of `mode` name."""
    with suppress(OSError):  # a file system without modes, or another user's file
        path.chmod(mode & 0o666)


@contextmanager
def unfinished(output: Path, cache_dir: str | Path | None = None) -> Iterator[tuple[Path, Path | None]]:
    """Empty folders `.NAME.unfinished` beside the output and in `cache_dir`, without what a killed run has left.

    After the block the one in `cache_dir` is gone, the other one only after an exception.

    Raises:
        RuntimeError: if another process is at it.
    """
    made = output.with_name(f".{output.name}.unfinished").absolute()
    cache = None if cache_dir is None else Path(cache_dir, made.name).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{made}.lock")  # the system frees it when the process ends, however that is
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"another process is writing {str(output)!r}; wait for it, or name another folder."
        ) from error
    for folder in (made, cache):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    made.mkdir(parents=True)
    if cache is not None:
        cache.mkdir(exist_ok=cache == made)
    try:
        yield made, cache
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        if cache is not None and cache != made:
            shutil.rmtree(cache, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """A file's checksum, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()
