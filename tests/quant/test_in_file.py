"""A type of tensor of another kind of file, added from outside: one object, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from peft_dlqat.file_layers import FileEmbedding, FileLinear, decode_weights, in_file
from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.fixed_point import FILE_STORAGES
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.in_file import FileStorage, file_storage

GROUP = 8
GRID = Grid(8, GROUP, "none", torch.float32)


@dataclass(frozen=True)
class Bytes(FileStorage):
    """Each group of eight has a float32 scale behind its bytes."""

    def decode(self, packed, grid):
        return packed.unflatten(-1, (-1, GROUP + 4))[..., :GROUP].contiguous().view(torch.int8).flatten(-2).float()

    def scales_and_zeros(self, packed, grid):
        groups = packed.unflatten(-1, (-1, GROUP + 4))
        return groups[..., GROUP:].contiguous().view(torch.float32).squeeze(-1), None

    def ship(self, packed, scale, zero, grid):
        return scale, None

    def write(self, packed, codes, scale, zero, grid):
        codes = codes.unflatten(-1, (-1, GROUP)).view(torch.uint8)
        return torch.cat([codes, scale.unsqueeze(-1).contiguous().view(torch.uint8)], -1).flatten(-2)


@pytest.fixture
def toy(monkeypatch):
    made = Bytes(8, 999, name="bytes")
    monkeypatch.setitem(FILE_STORAGES, "bytes", made)
    return made


def packed_weight(toy, rows=6, columns=16):
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return toy.write(None, codes, 0.01 * torch.rand(rows, columns // GROUP), None, GRID)


def test_it_is_found_by_its_name(toy):
    assert file_storage("bytes") is toy
    assert file_storage("int4") is None
    assert toy.step(torch.tensor([0.0, -2.0, 3.0])).tolist() == [torch.finfo(torch.float32).max, -2.0, 3.0]


def test_a_layer_computes_with_it(toy):
    packed, linear = packed_weight(toy), nn.Linear(16, 6)
    layer = FileLinear(linear, packed, "bytes", GRID, torch.float32)
    weight = layer.decoded(packed)
    s, _ = toy.scales_and_zeros(packed, GRID)
    expected = toy.decode(packed, GRID).unflatten(-1, (-1, GROUP)) * s.unsqueeze(-1)
    assert torch.equal(weight, expected.flatten(-2))
    x = torch.randn(3, 16, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, weight, linear.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 16))
    assert torch.equal(harden(packed, layer.quantizer(packed)).blocks, packed)
    assert layer.bfloat16().dtype == torch.bfloat16
    assert in_file(layer)


def test_an_embedding_decodes_the_rows_that_are_asked_for(toy):
    packed = packed_weight(toy)
    table = FileEmbedding(nn.Embedding(6, 16), packed, "bytes", GRID, torch.float32)
    ids = torch.tensor([[0, 5], [2, 2]])
    assert torch.equal(table(ids), nn.functional.embedding(ids, table.decoded(packed)))


def test_decoded_weights_are_plain_and_shared_as_before(toy):
    packed = packed_weight(toy)
    table = FileEmbedding(nn.Embedding(6, 16), packed, "bytes", GRID, torch.float32)
    head = FileLinear(nn.Linear(16, 6, bias=False), packed, "bytes", GRID, torch.float32)
    head.weight = table.weight
    x, ids = torch.randn(3, 16), torch.tensor([1, 4])
    expected = head(x), table(ids)
    decode_weights(nn.ModuleList([table, head]))
    assert head.weight is table.weight
    assert not in_file(head)
    assert torch.equal(head(x), expected[0])
    assert torch.equal(table(ids), expected[1])
