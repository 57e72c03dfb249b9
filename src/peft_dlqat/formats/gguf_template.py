"""A GGUF file of the same base model as template: its metadata, tokenizer, names and order of rows, with our weights.

llama.cpp's converter knows far more architectures than `gguf_metadata`. What it did with each tensor is found by
comparing the file with the base model: a file of other weights is refused, and every number that is written is the
model's own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..messages import shown
from ..module_names import folded
from ..quant.quantizer import QuantizedWeight
from .base import Add, Outline, TensorInfo
from .gguf import FILE, GGUF, block_type, file_type, float_bytes, ordered_rows
from .gguf_checks import check_basics
from .gguf_file import GGUFFile

if TYPE_CHECKING:
    pass

# Types whose numbers can be compared with the model's one by one.
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NEAR = 0.7  # cosine of a row with itself in the coarsest type; that of two different rows is about 0
_COLUMNS, _MOST_ROWS = 256, 2**15  # by which, and of which as many, rows are looked for that stand elsewhere


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model goes.

    Attributes:
        name: GGUF's.
        type: GGML's, of the file's own tensor.
        order: which of the model's rows stands where in the file.
        offset: what the file adds to it.
    """

    name: str
    type: str
    order: torch.Tensor | slice
    offset: float


class GGUFTemplate(GGUF):
    """GGUF as a file of the same base model has it.

    Args:
        file: the file.
        outline: what is exported.
        weights: the base model's tensors, adapted weights as they were before training, [out, in]; and whether each
            is the very one that the base came with, neither trained nor packed.

    Raises:
        ValueError: if it is not the same model's: by its sizes, names or numbers.
    """

    def __init__(
        self, file: GGUFFile, outline: Outline, weights: Iterable[tuple[TensorInfo, torch.Tensor, bool]]
    ) -> None:
        self._file = file
        try:
            self._constants = check_basics(file, outline.config)
        except ValueError as error:
            raise _another(file, str(error)) from None
        names = _names(file, outline, self._constants)
        self._places = {
            tensor.name: _place(file, names[tensor.name], tensor, value, whole) for tensor, value, whole in weights
        }

    def check_model(self, outline: Outline) -> None:
        """Nothing more: the file has said what the config says."""

    def dense_type(self, outline: Outline, tensor: TensorInfo) -> str:
        """The template's own, where it has not quantized the tensor and `embeddings` does not say another."""
        own = self._places[tensor.name].type
        keeps = own in _FLOATS and outline.setting(tensor)[0] != "embeddings"
        return own if keeps else super().dense_type(outline, tensor)

    @contextmanager
    def writing(self, folder: Path, outline: Outline, notes: list[str]) -> Iterator[Add]:
        """The template's metadata, to the byte but for the file's type; then all tensors."""
        import gguf

        if self._file.metadata.get("tokenizer.ggml.model", "none") == "none":
            notes.append("the template has no tokenizer: the file takes token ids only")
        types = {tensor.name: self._type(outline, tensor) for tensor in outline.tensors}
        infos = [(name, self._file.tensors[name].type, self._file.tensors[name].shape) for name in self._constants]
        infos += [
            (self._places[tensor.name].name, types[tensor.name], tensor.stored_shape) for tensor in outline.tensors
        ]
        count, metadata = _metadata(self._file.path, file_type(types))
        alignment = self._file.metadata.get("general.alignment", 32)
        header = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), count) + metadata
        start = 0
        for name, kind, shape in infos:
            number = gguf.GGMLQuantizationType[kind]
            block, size = gguf.GGML_QUANT_SIZES[number]
            header += struct.pack("<Q", len(name.encode())) + name.encode()
            header += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, start)
            start += _padded(math.prod(shape) // block * size, alignment)
        with (folder / FILE).open("wb") as new:

            def write(content: bytes | memoryview) -> None:
                new.write(content)
                new.write(bytes(_padded(new.tell(), alignment) - new.tell()))

            def add(tensor: TensorInfo, value: torch.Tensor | QuantizedWeight) -> None:
                place = self._places[tensor.name]
                if isinstance(value, QuantizedWeight):
                    packed = block_type(value.grid).pack(ordered_rows(value, place.order))
                else:
                    rows = (value.t() if tensor.transposed else value)[place.order]
                    rows = rows.float() + place.offset if place.offset else rows
                    packed = float_bytes(rows, types[tensor.name])
                write(np.ascontiguousarray(packed).data)

            write(header)
            for name in self._constants:
                write(self._file.read(name).numpy().data)
            yield add


def _names(file: GGUFFile, outline: Outline, constants: list[str]) -> dict[str, str]:
    """GGUF's name of each of the model's tensors; all of the file's are among them.

    Raises:
        ValueError: for a tensor that the other side has not.
    """
    import gguf

    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if file.architecture not in kinds:
        raise ValueError(
            f"template={str(file.path)!r} is of architecture {shown(file.architecture)}, which the installed gguf "
            "does not know; update the gguf package."
        )
    layers = outline.config.get_text_config().num_hidden_layers
    known = gguf.get_tensor_name_map(kinds[file.architecture], layers)
    found = {tensor.name: known.get_name(tensor.name, (".weight", ".bias")) for tensor in outline.tensors}
    lacking = [name for name, own in found.items() if own not in file.tensors]
    if lacking:
        raise _another(file, f"it has no place for {len(lacking)} of the model's tensors: {folded(lacking)}")
    further = [name for name in file.tensors if name not in found.values() and name not in constants]
    if further:
        raise _another(file, f"the model has none of {len(further)} of its tensors: {folded(further)}")
    if len(set(found.values())) != len(found):
        raise _another(file, "several of the model's tensors have one name in it")
    return {name: own for name, own in found.items() if own is not None}


def _place(file: GGUFFile, name: str, tensor: TensorInfo, value: torch.Tensor, whole: bool) -> Place:
    """Where a tensor goes, from how the file has it.

    Raises:
        ValueError: if it holds another one.
    """
    own, kind = file.tensors[name], file.tensors[name].type
    if own.shape != tuple(value.shape):
        raise _another(file, f"its {name} is {list(own.shape)}, and {tensor.name} {list(value.shape)}")
    theirs = torch.from_numpy(file.decode(name))
    offsets = (0.0, 1.0) if value.dim() == 1 else (0.0,)
    for offset in sorted(offsets, key=lambda offset: (theirs - value.float() - offset).abs().sum().item()):
        ours = value.float() + offset
        if whole and kind in _FLOATS:
            order = _order(theirs, ours.to(_FLOATS[kind]).float())
            if order is None:  # a base that was loaded in a narrower dtype
                order = _order(theirs.to(value.dtype).float(), ours)
        else:
            order = _near_order(theirs, ours)
        if order is not None:
            return Place(name, kind, order, offset)
    raise _another(file, f"its {name} does not hold the numbers of the base model's {tensor.name}")


def _order(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor | slice | None:
    """In which order our rows are theirs, to the bit; None where they are not."""
    if torch.equal(theirs, ours):
        return slice(None)
    rows: dict[bytes, list[int]] = {}
    for index, row in enumerate(_rows(ours)):
        rows.setdefault(row, []).append(index)
    found = [rows[row].pop() if rows.get(row) else -1 for row in _rows(theirs)]
    return None if -1 in found else torch.tensor(found)


def _rows(tensor: torch.Tensor) -> Iterator[bytes]:
    return (row.tobytes() for row in (tensor + 0.0).numpy())  # -0.0 becomes 0.0


def _near_order(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor | slice | None:
    """In which order our rows are theirs, but for how they are rounded or trained; None where they are not."""
    if theirs.dim() == 1:
        return slice(None) if _cosines(theirs[None], ours[None]).min() > _NEAR else None
    if _cosines(theirs, ours).min() > _NEAR:
        return slice(None)
    if len(theirs) > _MOST_ROWS or theirs.dim() != 2:
        return None
    step = max(1, theirs.shape[1] // _COLUMNS)
    a, b = (torch.nn.functional.normalize(rows[:, ::step], dim=-1) for rows in (theirs, ours))
    order = (a @ b.T).argmax(-1)
    permutes = len(order.unique()) == len(order)
    return order if permutes and _cosines(theirs, ours[order]).min() > _NEAR else None


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of rows; 1 where both are zero."""
    a, b = a.flatten(1), b.flatten(1)
    found = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return torch.where((a == 0).all(-1) & (b == 0).all(-1), 1.0, found)


def _metadata(path: Path, kind: int) -> tuple[int, bytes]:
    """How many keys a file has, and their bytes, with another type of file."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    first = min(field.offset for field in fields)
    ends = {field.name: field.offset + sum(int(part.nbytes) for part in field.parts) for field in fields}
    content = bytearray(reader.data[first : max(ends.values())])
    if (end := ends.get("general.file_type")) is not None:
        content[end - first - 4 : end - first] = struct.pack("<I", kind)
    return len(fields), bytes(content)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _another(file: GGUFFile, why: str) -> ValueError:
    return ValueError(
        f"template={str(file.path)!r} is not of the model that is exported: {why}; give a file that llama.cpp's "
        "converter made of the very base model."
    )
