"""What a calibration from disk has done so far, kept beside its output, so that one that was killed can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..config import DLQATConfig
from ..decoder import Call, Hidden
from ..train.blocks import BlockError, Fit
from ..train.teacher_store import write_whole

State = dict[str, torch.Tensor]


class Unfinished:
    """Adapters of the decoder layers that are done, each a file that appears under its name when it is whole.

    A file also says what it was calculated from, as `Source` has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own: list[Path] = []

    def get(self, index: int, source: str) -> tuple[State, BlockError] | None:
        """A layer's adapter and error; None if it is not done, or its file cannot be read.

        Raises:
            ValueError: if they were calculated from something else.
        """
        path = self._path(index)
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata()
            state = load_file(path)
        except (FileNotFoundError, SafetensorError):
            return None
        if said["source"] != source:
            raise ValueError(
                f"{str(self.folder)!r} holds an unfinished calibration with other arguments, batches or weights; call "
                "it with those to go on, or remove the folder to begin anew."
            )
        return state, BlockError(**json.loads(said["error"]))

    def put(self, index: int, state: State, error: BlockError, source: str) -> None:
        """Keep a layer's adapter and error."""
        path, said = self._path(index), {"error": json.dumps(error._asdict()), "source": source}
        write_whole(path, lambda temporary: save_file(state, temporary, metadata=said))
        self._own.append(path)

    def state(self) -> State:
        """The adapters of all layers that were put."""
        return {name: tensor for path in self._own for name, tensor in load_file(path).items()}

    def clear(self) -> None:
        """Forget all layers."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.safetensors"


class Source:
    """A hash of all that the next decoder layer's adapter depends on, but for the seed."""

    def __init__(self, config: DLQATConfig, fit: Fit, calls: list[list[Call]], hidden: Hidden) -> None:
        # What a config says of the base model's place and of versions changes nothing.
        said = {key: value for key, value in config.to_dict().items() if key not in _NO_ARGUMENTS}
        # Sets, whose order is another in each process, are written as sorted lists.
        arguments = json.dumps({"config": said, "fit": asdict(fit)}, sort_keys=True, default=sorted)
        self._digest = hashlib.blake2b(arguments.encode(), digest_size=20)
        for index in range(len(calls)):
            self.add([hidden.teacher[index], *([] if hidden.counted[index] is None else [hidden.counted[index]])])
        seen: set[int] = set()

        def add(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in seen:  # layers share masks and positions
                seen.add(id(tensor))
                self.add([tensor])
            return tensor

        recursively_apply(add, calls)

    def add(self, tensors: list[Any]) -> str:
        """Take in a layer's weights, say; the hash so far."""
        for tensor in tensors:
            tensor = tensor.detach().contiguous()
            self._digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
            self._digest.update(tensor.view(-1).view(torch.uint8).numpy())
        return self._digest.hexdigest()


_NO_ARGUMENTS = ("base_model_name_or_path", "peft_version", "record")


def check_new(output: Path) -> None:
    """Raises a FileExistsError if there is a folder already."""
    if output.exists():
        raise FileExistsError(f"output_dir={str(output)!r} exists; name a new folder, or remove it first.")


@contextmanager
def unfinished(output: Path) -> Iterator[Unfinished]:
    """The folder `.NAME.unfinished` beside `output`, for one process at a time; it stays while it holds layers.

    Raises:
        RuntimeError: if another process works in it.
        FileExistsError: if `output` exists.
    """
    folder = output.with_name(f".{output.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"another process is calibrating for output_dir={str(output)!r}; wait for it, or name another folder."
        ) from error
    try:
        check_new(output)  # again: another process may have made it before this one had the lock
        yield Unfinished(folder)
    finally:
        if not any(folder.glob("*.safetensors")):
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
