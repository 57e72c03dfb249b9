"""A folder of config.json and safetensors files as it lies on the disk, checked before any weight is read."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from safetensors import SafetensorError, safe_open

from ..files import sha256_of
from ..messages import cut, shown
from ..quant.quantizer import QuantizedWeight
from .layout import Layout
from .origin import Origin, Put, copy_but

# What an export adds to a folder begins so.
OURS = "dlqat_export"
# Weights of other kinds, which an export in place of a folder's own would leave as they were before training.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_REMEDY = "copy or download it again"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        file: the file.
        dtype: its dtype; None for one that is no model's here.
        shape: its shape.
        start: the first byte in the file.
        size: bytes.
    """

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class SafetensorsFolder:
    """A folder.

    Attributes:
        path: where it is.
        config: content of config.json.
        files: the files of weights.
        tensors: what is in them, by name.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFolder:
        """Read config.json and the files' headers.

        Raises:
            FileNotFoundError: for a folder without config.json or safetensors files.
            ValueError: for files that are damaged, or do not have what the index says.
        """
        config = read_json(path / "config.json")
        files = weight_files(path)
        tensors: dict[str, StoredTensor] = {}
        if others := sorted({file.name for file in path.glob("*.safetensors")} - set(files.values())):
            raise ValueError(
                f"{path} has {others[0]} beside the files that its weights are in, and engines may read either; "
                "remove what is not of the model."
            )
        for file in sorted(set(files.values())):
            for name, tensor in _header(path / file).items():
                if name in tensors:
                    raise ValueError(f"{path} has {name} in {tensors[name].file.name} and in {file}; {_REMEDY}.")
                tensors[name] = tensor
        for name, file in files.items():
            if name and (name not in tensors or tensors[name].file.name != file):
                raise ValueError(f"{path} has no {shown(name)} in {file}, as {INDEX} says; {_REMEDY}.")
        return cls(path, config, tuple(path / file for file in sorted(set(files.values()))), tensors)

    @property
    def size(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.stat().st_size for file in self.files)

    def sha256(self) -> str:
        """A checksum of all files of weights, in hexadecimal digits."""
        return of_files({file.name: sha256_of(file) for file in self.files})

    def read(self, name: str) -> torch.Tensor:
        """A tensor; a copy, since another process may write the file.

        Raises:
            ValueError: for a dtype that no model has here, and a file that has been cut since.
        """
        tensor = self.tensors[name]
        if tensor.dtype is None:
            raise ValueError(
                f"{tensor.file} has {name} in a dtype that is none of {', '.join(_DTYPES)}; use another file"
            )
        found = bytearray(tensor.size)
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            if file.readinto(found) != tensor.size:
                raise ValueError(f"{tensor.file} ends within {name}; {_REMEDY}.")
        return torch.frombuffer(found, dtype=tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class FolderOrigin(Origin):
    """A folder that a model's weights come from.

    Attributes:
        folder: the folder.
        layout: how it keeps quantized weights.
    """

    is_folder: ClassVar[bool] = True

    folder: SafetensorsFolder = field(kw_only=True)
    layout: Layout = field(kw_only=True)

    @property
    def size(self) -> int:
        """Bytes of the files of weights."""
        return self.folder.size

    def exact(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Read again, where it is a tensor of the folder; what is quantized has no more digits than that."""
        return self.folder.read(name) if name in self.folder.tensors and name not in self.names else value

    @contextmanager
    def written_to(self, folder: Path, replaced: Iterable[str]) -> Iterator[Put]:
        """Every file of the folder is copied, but for other weights, hidden files, and those of an export."""
        missing = set(replaced)
        gaps: dict[Path, list[StoredTensor]] = {file: [] for file in self.folder.files}
        for name in missing:
            for tensor in self._places(name).values():
                gaps[tensor.file].append(tensor)
        with ExitStack() as stack:
            new: dict[Path, BinaryIO] = {}
            digests = {}
            for path in sorted(self.path.rglob("*")):
                inside = path.relative_to(self.path)
                if not path.is_file() or any(part.startswith((".", OURS)) for part in inside.parts):
                    continue
                if path not in gaps and any(path.match(other) for other in ("*.safetensors", *OTHER_WEIGHTS)):
                    continue  # not those that were trained
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                if path not in gaps:
                    shutil.copyfile(path, folder / inside)
                    continue
                new[path] = stack.enter_context((folder / inside).open("w+b"))
                places = [(tensor.start, tensor.start + tensor.size) for tensor in gaps[path] if tensor.size]
                digests[path.name] = copy_but(path, new[path], places)
            self.check_unchanged(of_files(digests))

            def put(name: str, weight: QuantizedWeight) -> None:
                found = self.layout.tensors(weight)
                for part, place in self._places(name).items():
                    value = found[part]
                    if value.dtype != place.dtype or tuple(value.shape) != place.shape:
                        raise ValueError(
                            f"{name} has {part} {list(value.shape)} of {value.dtype}, and its place in the file "
                            f"{list(place.shape)} of {place.dtype}."
                        )
                    new[place.file].seek(place.start)
                    new[place.file].write(value.flatten().view(torch.uint8).numpy().data)
                missing.remove(name)

            yield put
        assert not missing, missing

    def _places(self, name: str) -> dict[str, StoredTensor]:
        """The tensors of a weight, by their names within its module."""
        module = self.names[name]
        parts = (*self.layout.parts, *self.layout.fixed)
        return {part: self.folder.tensors[key] for part in parts if (key := f"{module}.{part}") in self.folder.tensors}


def weight_files(folder: Path) -> dict[str, str]:
    """The file of each tensor by the index; {"": "model.safetensors"} where there is none.

    Raises:
        FileNotFoundError: for files that are not there.
        ValueError: for an index that is damaged.
    """
    index, files = folder / INDEX, {"": SINGLE}
    if index.is_file():
        try:
            files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is damaged ({type(error).__name__}: {cut(error)}); {_REMEDY}.") from error
        strange = [name for name in files.values() if not _is_file_name(name)]
        if strange or not files:
            raise ValueError(
                f"{index} is damaged: {shown(strange[0]) if strange else 'no file'} is no name of a file beside "
                f"it; {_REMEDY}."
            )
    missing = sorted(name for name in set(files.values()) if not (folder / name).is_file())
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {missing[0]}; save the model with save_pretrained(), which writes safetensors."
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give the folder of a model, with its config.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({cut(error)}); {_REMEDY}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {shown(content)}, no object; {_REMEDY}.")
    return content


def of_files(digests: Mapping[str, str]) -> str:
    """A checksum of several files, of theirs by name; of a single one its own."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file.

    Raises:
        ValueError: if it is damaged, or shorter than it says.
    """
    try:
        with safe_open(path, framework="pt"):  # which checks that sizes, places and the file's length agree
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({str(error)[:300]}); {_REMEDY}.") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    return {
        name: StoredTensor(
            path,
            _DTYPES.get(entry["dtype"]),
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str) and name != "" and Path(name).name == name and len(name.encode(errors="replace")) < 256
    )
