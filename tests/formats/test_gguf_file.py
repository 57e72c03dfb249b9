"""A GGUF file's header, as the gguf package reads it too; what is wrong with a file is said before memory is taken."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from conftest import random_model
from export_models import SHAPE
from gguf_files import write_gguf
from transformers import LlamaConfig

from peft_dlqat.formats.gguf_file import GGUFFile, GGUFOrigin
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.quantizer import QuantizedWeight

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

GRID = Grid(4, 32, "none", torch.float16)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = random_model(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}))
    return write_gguf(model, tmp_path_factory.mktemp("file") / "small.gguf", "legacy")


def test_it_reads_what_the_gguf_package_reads(path):
    file, reader = GGUFFile.open(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        own = file.tensors[tensor.name]
        assert (own.type, own.size) == (tensor.tensor_type.name, tensor.n_bytes)
        assert own.start == tensor.data_offset
        assert np.array_equal(file.read(tensor.name).numpy().ravel(), tensor.data.view(np.uint8).ravel())
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.decode(tensor.name), expected.reshape(own.shape))
    assert file.architecture == "llama"
    assert file.metadata["general.of_nobody"] == "kept as it is"
    assert file.types["F32"] == 3


def with_number(content, key, kind, value):
    """A file's bytes with another number behind a key's name and type."""
    at = content.index(key.encode()) + len(key) + 4
    return content[:at] + struct.pack(f"<{kind}", value) + content[at + struct.calcsize(kind) :]


def with_type(content, name, number):
    """A file's bytes with another type of a tensor of two dimensions."""
    at = content.index(name.encode()) + len(name) + 4 + 16
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda content: b"", "does not begin with 'GGUF'"),
        (lambda content: b"GGML" + content[4:], "does not begin with 'GGUF'"),
        (lambda content: content[:4] + struct.pack("<I", 1) + content[8:], "version 1"),
        (lambda content: content[:4] + content[4:8][::-1] + content[8:], "version 50331648"),
        (lambda content: content[:20], "no whole GGUF header"),
        (lambda content: content[:8] + struct.pack("<Q", 2**60) + content[16:], "more than it has room for"),
        (lambda content: content[:16] + struct.pack("<Q", 2**60) + content[24:], "more than it has room for"),
        (lambda content: content[:24] + struct.pack("<Q", 2**60) + content[32:], "no whole GGUF header"),
        (lambda content: content[:-1000], "would end at"),
        (lambda content: content[:400], "no whole GGUF header"),
        (lambda content: with_type(content, "blk.0.attn_q.weight", 999), "type 999"),
        (lambda content: with_type(content, "blk.0.attn_q.weight", 12), "no whole blocks of Q4_K"),
        (lambda content: with_type(content, "blk.0.attn_q.weight", 0), "lies within another tensor|would end at"),
        (lambda content: content.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "two tensors of one name"),
    ],
)
def test_a_spoilt_file_is_refused(path, tmp_path, spoilt, message):
    (tmp_path / "spoilt.gguf").write_bytes(spoilt(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        GGUFFile.open(tmp_path / "spoilt.gguf")
    assert len(str(error.value)) < 600


def test_one_of_several_parts_is_refused(tmp_path):
    writer = gguf.GGUFWriter(path=str(tmp_path / "part.gguf"), arch="llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="one of 3 parts"):
        GGUFFile.open(tmp_path / "part.gguf")


def test_no_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        GGUFFile.open(tmp_path / "none.gguf")


def test_what_is_replaced_is_not_copied(path, tmp_path):
    file, name = GGUFFile.open(path), "blk.0.attn_q.weight"
    rows = file.tensors[name].shape[0]
    order = torch.arange(rows).flip(0)
    origin = GGUFOrigin(path, file.sha256(), {"q": name}, file=file, orders={"q": order})
    weight = QuantizedWeight(torch.empty(0), torch.empty(0), None, GRID, file.read(name)[order])
    with origin.written_to(tmp_path, ["q"]) as put:
        assert not GGUFFile.open(tmp_path / "model.gguf").read(name).any()
        put("q", weight)
    assert (tmp_path / "model.gguf").read_bytes() == path.read_bytes()


def test_a_file_that_has_changed_is_not_written(path, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    file = GGUFFile.open(copy)
    origin = GGUFOrigin(copy, file.sha256(), file=file)
    copy.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="has changed since it was opened"), origin.written_to(tmp_path, []):
        pass
