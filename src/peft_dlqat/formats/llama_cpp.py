"""llama.cpp, from the wheel `xllamacpp`: the logits of a GGUF file.

It runs in a process of its own, whose program this file is, since it aborts the process on a file that it cannot bear.
Its C functions are called by ctypes. Its `Server`, which the wheel offers, has no logits, and wants a tokenizer.
"""

from __future__ import annotations

import array
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_F32, _F16, _BF16 = 0, 1, 30  # of ggml's types
_CHUNK = 2**22  # weights that are dequantized at a time; a multiple of every block


def half_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU as llama.cpp has it: a table from float16 to float16, and its limits beyond 10."""
    import torch

    rounded = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, rounded))


def logits(file: Path, ids: torch.Tensor, as_float32: bool) -> torch.Tensor:
    """Logits [prompts, tokens, vocabulary] of a GGUF file, float32, as llama.cpp computes them on the CPU.

    Args:
        file: the file.
        ids: token ids [prompts, tokens].
        as_float32: run a copy whose tensors llama.cpp's own dequantizer has made float32, with the same metadata.
            llama.cpp rounds what it multiplies by quantized weights to 8 bits, and computes in float32 with float32.
            The copy takes 4 bytes a weight on the disk while it runs.

    Raises:
        RuntimeError: if llama.cpp does not load or run the file; with what it says.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="dlqat-llama-cpp-") as room:
        asked, found = Path(room) / "ids", Path(room) / "logits"
        asked.write_bytes(array.array("i", ids.flatten().tolist()).tobytes())
        command = [sys.executable, __file__, str(file), str(asked), str(found), str(ids.shape[1])]
        if as_float32:
            command.append(str(Path(room) / "float32.gguf"))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = done.stderr.splitlines()
            said = [line for line in lines if "error" in line.lower() or "ASSERT" in line] or lines[-1:]
            raise RuntimeError(f"llama.cpp does not run {file.name}: {'; '.join(said[:2])}")
        numbers = torch.frombuffer(bytearray(found.read_bytes()), dtype=torch.float32)
    return numbers.view(*ids.shape, -1)


class _Pointer(ctypes.c_void_p):
    """A pointer that a function returns; ctypes would make a number of a plain c_void_p."""


class _Settings(ctypes.Structure):
    """llama.cpp's parameters of models or contexts, which go by value, with room for what versions append."""

    _fields_ = [("words", ctypes.c_int32 * 256)]


class _GGUFSettings(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


# What functions return that is no int.
_RETURNS: dict[str, Any] = {
    "llama_model_default_params": _Settings,
    "llama_context_default_params": _Settings,
    "llama_batch_init": _Batch,
    **dict.fromkeys(
        (
            "llama_model_load_from_file",
            "llama_init_from_model",
            "llama_model_get_vocab",
            "llama_get_memory",
            "llama_get_logits",
            "gguf_init_from_file",
        ),
        _Pointer,
    ),
    **dict.fromkeys(
        ("gguf_get_data_offset", "gguf_get_tensor_offset", "gguf_get_tensor_size", "gguf_get_meta_size"),
        ctypes.c_size_t,
    ),
    **dict.fromkeys(("ggml_type_name", "gguf_get_tensor_name"), ctypes.c_char_p),
    "gguf_get_n_tensors": ctypes.c_int64,
    "gguf_write_to_file": ctypes.c_bool,
}


class _Library:
    """The C functions that the wheel's library exports."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("xllamacpp.xllamacpp")
        assert spec is not None and spec.origin is not None
        self._functions = ctypes.CDLL(spec.origin)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._functions, name)
        function.restype = _RETURNS.get(name, ctypes.c_int32)
        return function


def _run(file: str, asked: str, found: str, length: int, copy: str = "") -> None:
    library = _Library()
    if copy:
        _write_float32(library, file, copy)
    model, context = _load(library, copy or file, length)
    ids = array.array("i", Path(asked).read_bytes())
    width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    with open(found, "wb") as out:
        for start in range(0, len(ids), length):
            library.llama_memory_clear(library.llama_get_memory(context), ctypes.c_bool(True))
            if library.llama_decode(context, _batch(library, ids[start : start + length])) != 0:
                raise RuntimeError("error: llama_decode failed")
            out.write(ctypes.string_at(library.llama_get_logits(context), 4 * length * width))


def _load(library: _Library, file: str, length: int) -> tuple[_Pointer, _Pointer]:
    """A model on the CPU, and a context of `length` tokens with keys and values in float32."""
    library.llama_backend_init()
    settings = library.llama_model_default_params()
    _check(settings.words[4] == -1, "llama_model_params")
    settings.words[4] = 0  # layers on a GPU
    model = library.llama_model_load_from_file(os.fsencode(file), settings)
    if not model:
        raise RuntimeError("error: llama_model_load_from_file failed")
    settings = library.llama_context_default_params()
    words = list(settings.words)
    _check(words[:3] == [512, 2048, 512], "llama_context_params")
    # Where these stand differs by version. Types of keys and values: float16, after two pointers that are null.
    types = next((i for i in range(16, 60) if words[i - 4 : i + 2] == [0, 0, 0, 0, _F16, _F16]), 0)
    flash = next((i for i in range(8, 20) if words[i - 3 : i + 1] == [-1] * 4), 0)  # the last of four choices
    _check(types > flash > 0, "llama_context_params")
    settings.words[:3] = [length] * 3  # of the context, of a batch, of what is computed at once
    settings.words[types : types + 2] = [_F32, _F32]
    settings.words[flash] = 0  # flash attention rounds to float16
    context = library.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("error: llama_init_from_model failed")
    return model, context


def _check(known: bool, what: str) -> None:
    if not known:
        raise RuntimeError(f"error: this version of xllamacpp has another {what}; install the one that is tested")


def _batch(library: _Library, tokens: array.array[int]) -> _Batch:
    """One sequence; of each token the logits are wanted."""
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    return batch


def _write_float32(library: _Library, file: str, copy: str) -> None:
    """Write a copy of a GGUF file with the same metadata, and each tensor in float32."""
    handle = library.gguf_init_from_file(os.fsencode(file), _GGUFSettings(no_alloc=True))
    if not handle:
        raise RuntimeError("error: gguf_init_from_file failed")
    tensors = [ctypes.c_int64(index) for index in range(library.gguf_get_n_tensors(handle))]
    start = library.gguf_get_data_offset(handle)
    stored = [
        (
            library.gguf_get_tensor_type(handle, tensor),
            start + library.gguf_get_tensor_offset(handle, tensor),
            library.gguf_get_tensor_size(handle, tensor),
        )
        for tensor in tensors
    ]
    for tensor in tensors:
        library.gguf_set_tensor_type(handle, library.gguf_get_tensor_name(handle, tensor), _F32)
    if not library.gguf_write_to_file(handle, os.fsencode(copy), ctypes.c_bool(True)):
        raise RuntimeError("error: gguf_write_to_file failed")
    start = library.gguf_get_meta_size(handle)
    with open(file, "rb") as source, open(copy, "r+b") as target:
        for tensor, (kind, place, size) in zip(tensors, stored, strict=True):
            source.seek(place)
            target.seek(start + library.gguf_get_tensor_offset(handle, tensor))
            _write_tensor(library, source, target, kind, size)
        end = target.tell()
        target.truncate(end + -end % 32)  # its padding


def _write_tensor(library: _Library, source: Any, target: Any, kind: int, size: int) -> None:
    """Dequantize the next `size` bytes of a file into another."""
    block, block_bytes = library.ggml_blck_size(kind), library.ggml_type_size(kind)
    while size:
        wanted = min(size, _CHUNK // block * block_bytes)
        read = source.read(wanted)
        if len(read) != wanted:
            raise RuntimeError("error: the file is truncated")
        size -= wanted
        if kind != _F32:
            count = len(read) // block_bytes * block
            numbers = (ctypes.c_float * count)()
            _dequantizer(library, kind)(read, numbers, ctypes.c_int64(count))
            read = bytes(numbers)
        target.write(read)


def _dequantizer(library: _Library, kind: int) -> Any:
    """llama.cpp's own function from a row of blocks to float32."""
    known = {_F16: "ggml_fp16_to_fp32_row", _BF16: "ggml_bf16_to_fp32_row"}
    name = library.ggml_type_name(kind).decode()
    function = getattr(library, known.get(kind, f"dequantize_row_{name}"))
    function.restype = None
    return function


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules have the names of packages
    _run(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
