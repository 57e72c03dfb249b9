"""What a calibration from disk has done so far, kept beside its output, so that one that was killed can go on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..config import DLQATConfig
from .blocks import BlockError, Fit

State = dict[str, torch.Tensor]


class Unfinished:
    """Adapters of the decoder layers that are done, each a file that appears under its name when it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, plan: str) -> None:
        """Say what is being calibrated, or check that it is the same as what the folder holds.

        Raises:
            ValueError: if it is not.
        """
        path = self.folder / "plan"
        found = path.read_text() if path.exists() else plan
        if self._parts() and found != plan:
            raise ValueError(
                f"{str(self.folder)!r} holds an unfinished calibration with other arguments, batches or weights; call "
                "it with those to go on, or remove the folder to begin anew."
            )
        path.write_text(plan)

    def get(self, index: int) -> tuple[State, BlockError] | None:
        """A layer's adapter and error; None if it is not done, or its file cannot be read."""
        path = self._path(index)
        try:
            with safe_open(path, framework="pt") as file:
                error = json.loads(file.metadata()["error"])
            return load_file(path), BlockError(**error)
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, index: int, state: State, error: BlockError) -> None:
        """Keep a layer's adapter and error."""
        path = self._path(index)
        temporary = path.with_suffix(".part")
        save_file(state, temporary, metadata={"error": json.dumps(error._asdict())})
        os.replace(temporary, path)

    def state(self) -> State:
        """The adapters of all layers."""
        return {name: tensor for path in self._parts() for name, tensor in load_file(path).items()}

    def clear(self) -> None:
        """Forget all layers."""
        for path in self._parts():
            path.unlink()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.safetensors"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


@contextmanager
def unfinished(output: Path) -> Iterator[Unfinished]:
    """The folder `.NAME.unfinished` beside `output`, for one process at a time; it stays while it holds layers.

    Raises:
        RuntimeError: if another process works in it.
    """
    folder = output.with_name(f".{output.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    lock, kept = FileLock(folder / "lock"), Unfinished(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RuntimeError(
            f"another process is calibrating for output_dir={str(output)!r}; wait for it, or name another folder."
        ) from error
    try:
        yield kept
    except FloatingPointError:  # it would come again
        kept.clear()
        raise
    finally:
        lock.release()
        if not kept._parts():
            shutil.rmtree(folder, ignore_errors=True)


def plan_of(model_id: str | Path, config: DLQATConfig, fit: Fit, inputs: Iterable[torch.Tensor]) -> str:
    """All that a calibration's result depends on but the seed: arguments, and the first decoder layer's inputs."""
    digest = hashlib.blake2b(digest_size=20)
    for state in inputs:
        digest.update(f"{list(state.shape)} {state.dtype}".encode())
        digest.update(state.contiguous().view(torch.uint8).numpy().tobytes())
    arguments: dict[str, Any] = {"model": str(model_id), "config": config.to_dict(), "fit": asdict(fit)}
    # Sets, whose order is another in each process, are written as sorted lists.
    return json.dumps({**arguments, "inputs": digest.hexdigest()}, sort_keys=True, default=sorted)
