"""A GGUF file as it lies on the disk: what its header says, checked against its size before anything is read."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..files import sha256_of
from ..messages import shown
from ..quant.quantizer import QuantizedWeight
from .origin import Origin, Put, copy_but

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_REMEDY = "the file is damaged or cut short; copy or download it again"
_MOST_DIMENSIONS = 4
FILE = "model.gguf"  # what is written


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file.

    Attributes:
        name: GGUF's name of it.
        type: GGML's name of its type.
        shape: [out, in], or of another number of dimensions; the last ones are neighbours.
        start: the first byte in the file.
        size: bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """A file.

    Attributes:
        path: where it is.
        metadata: its keys and values, arrays as lists.
        tensors: by GGUF's names, in the file's order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, FileTensor]

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read a file's header.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for what is no GGUF file, or claims sizes that it does not have, is a part of several, or has
                a type of tensor that the installed `gguf` does not know.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}; give the path of a GGUF file.")
        with path.open("rb") as file:
            try:
                return _Reader(file, path).read()
            except (struct.error, UnicodeDecodeError, EOFError, OverflowError, RecursionError) as error:
                raise ValueError(f"{path} has no whole GGUF header ({str(error)[:200]}): {_REMEDY}.") from error

    @property
    def architecture(self) -> str:
        """GGUF's name of the model's architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def types(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        return dict(Counter(tensor.type for tensor in self.tensors.values()).most_common())

    def sha256(self) -> str:
        """The file's checksum, in hexadecimal digits."""
        return sha256_of(self.path)

    def read(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, uint8 [..., bytes of a row]; a copy, since another process may write the file."""
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            found = bytearray(tensor.size)
            if file.readinto(found) != tensor.size:
                raise ValueError(f"{self.path} ends within {name}: {_REMEDY}.")
        rows = math.prod(tensor.shape[:-1])
        return torch.frombuffer(found, dtype=torch.uint8).view(*tensor.shape[:-1], tensor.size // rows)

    def empty(self, name: str) -> torch.Tensor:
        """As `read`, without reading: on the meta device."""
        tensor = self.tensors[name]
        row = tensor.size // math.prod(tensor.shape[:-1])
        return torch.empty((*tensor.shape[:-1], row), dtype=torch.uint8, device="meta")

    def decode(self, name: str) -> Any:
        """A tensor's numbers, as a NumPy array of its shape in float32."""
        import gguf

        tensor = self.tensors[name]
        return gguf.dequantize(self.read(name).numpy(), gguf.GGMLQuantizationType[tensor.type]).reshape(tensor.shape)


@dataclass(frozen=True)
class GGUFOrigin(Origin):
    """The file that a model's weights come from.

    Attributes:
        file: the file.
        orders: which of the file's rows stands where in the model, by the model's names.
        dense: vectors that the model has in a narrower dtype, as the file has them; by the model's names.
    """

    format: str = "gguf"
    file: GGUFFile = field(kw_only=True)
    orders: dict[str, torch.Tensor] = field(default_factory=dict)
    dense: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def exact(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Of a vector; other tensors have no more digits than the model's."""
        return self.dense.get(name, value)

    @contextmanager
    def written_to(self, folder: Path, replaced: Iterable[str]) -> Iterator[Put]:
        """One file."""
        missing = set(replaced)
        places = [self.file.tensors[self.names[name]] for name in missing]
        with (folder / FILE).open("w+b") as new:
            self.check_unchanged(
                copy_but(self.path, new, [(place.start, place.start + place.size) for place in places])
            )

            def put(name: str, weight: QuantizedWeight) -> None:
                assert weight.blocks is not None
                place = self.file.tensors[self.names[name]]
                ordered = torch.empty_like(weight.blocks)
                ordered[self.orders[name]] = weight.blocks
                if ordered.nbytes != place.size:
                    raise ValueError(f"{name} has {ordered.nbytes:,} bytes, and its place in the file {place.size:,}.")
                new.seek(place.start)
                new.write(ordered.numpy().data)
                missing.remove(name)

            yield put
        assert not missing, missing


class _Reader:
    """Reads a header; every count is checked against what is left of the file before it is believed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._size = file, path, path.stat().st_size

    def read(self) -> GGUFFile:
        if self._file.read(4) != b"GGUF":
            raise ValueError(f"{self._path} is no GGUF file: it does not begin with 'GGUF'.")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(
                f"{self._path} is of GGUF's version {version}, and only 2 and 3 (little-endian) are read here; "
                "convert it again with llama.cpp."
            )
        tensors, keys = self._count(24), self._count(12)
        metadata = dict(self._entry() for _ in range(keys))
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise ValueError(
                f"{self._path} is one of {parts} parts; join them with llama.cpp's llama-gguf-split --merge."
            )
        found = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(
                f"{self._path}: general.alignment={shown(alignment)} must be a positive integer: {_REMEDY}."
            )
        start = -(-self._file.tell() // alignment) * alignment
        return GGUFFile(self._path, metadata, self._placed(found, start))

    def _placed(self, found: list[tuple[str, str, tuple[int, ...], int, int]], start: int) -> dict[str, FileTensor]:
        """The tensors at their places in the file, which must lie in it and apart from each other."""
        tensors = {
            name: FileTensor(name, kind, shape, start + offset, size) for name, kind, shape, offset, size in found
        }
        if len(tensors) != len(found):
            raise ValueError(f"{self._path} has two tensors of one name: {_REMEDY}.")
        end = start
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
            if tensor.start < end:
                raise ValueError(f"{self._path}: {tensor.name} lies within another tensor: {_REMEDY}.")
            end = tensor.start + tensor.size
            if end > self._size:
                raise ValueError(
                    f"{self._path} has {self._size:,} bytes, but {tensor.name} would end at {end:,}: {_REMEDY}."
                )
        return tensors

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._bytes(struct.calcsize(kind)))[0]

    def _bytes(self, count: int) -> bytes:
        found = self._file.read(count) if count <= self._size - self._file.tell() else b""
        if len(found) != count:
            raise EOFError(f"it ends within {count:,} bytes at {self._file.tell():,}")
        return found

    def _count(self, smallest: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self._number("Q")
        if count * smallest > self._size - self._file.tell():
            raise EOFError(f"it claims {count:,} entries, more than it has room for")
        return int(count)

    def _text(self) -> str:
        return self._bytes(self._count(1)).decode("utf-8", errors="surrogateescape")

    def _entry(self) -> tuple[str, Any]:
        return self._text(), self._value(self._number("I"))

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY or depth > 2:
            raise EOFError(f"it has a value of kind {kind}, which there is not")
        inner = self._number("I")
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            count = self._count(size)
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self._bytes(count * size)))
        return [self._value(inner, depth + 1) for _ in range(self._count(8))]

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        import gguf

        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise EOFError(f"{shown(name)} has {dimensions} dimensions")
        shape = tuple(int(self._number("Q")) for _ in range(dimensions))[::-1]
        number, offset = self._number("I"), int(self._number("Q"))
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(
                f"{self._path}: {name} is of GGML's type {number}, which the installed gguf does not know; update the "
                "gguf package."
            ) from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"{self._path}: {name} {list(shape)} has no whole blocks of {kind.name}: {_REMEDY}.")
        return name, kind.name, shape, offset, math.prod(shape) // block * size
