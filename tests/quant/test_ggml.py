"""GGML's block types both ways: the gguf package decodes the same numbers, and the same bytes are written again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_dlqat.quant import reference
from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.ggml import GGML_TYPES, Half
from peft_dlqat.quant.quantizer import Quantizer

gguf = pytest.importorskip("gguf")

TYPES = sorted(GGML_TYPES)
K_QUANTS = [name for name in TYPES if name.endswith("_K")]
ROWS, BLOCKS = 16, 4


def put(kind, packed, name, values):
    """Write float16 numbers [rows, blocks] into blocks."""
    at = kind.layout[name].at
    blocks = packed.unflatten(-1, (-1, kind.size))
    blocks[..., at : at + 2] = values.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def random_blocks(kind, seed=0):
    """Any bytes, and float16 numbers as other writers have them: of both signs, zero, and subnormal."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (ROWS, BLOCKS * kind.size), dtype=torch.uint8, generator=generator)
    for name, place in kind.layout.items():
        if isinstance(place, Half):
            values = torch.randn(ROWS, BLOCKS, generator=generator) * 10 ** (
                torch.rand(ROWS, BLOCKS, generator=generator) * 8 - 5
            )
            values[0], values[1], values[2], values[3] = 0.0, -0.0, 6e-8, -1.2e-7
            put(kind, packed, name, values)
    return packed


def quantizer(kind, packed, m=1.0, B=None, A=None, shift=0.0):
    """DL-QAT's on a file's weight, as the layer makes it."""
    s, zero = kind.scales_and_zeros(packed, kind.grid)
    columns = s.shape[1] * kind.grid.group_size
    A = torch.zeros(1, columns) if A is None else A
    B = torch.zeros(len(s), 1) if B is None else B
    moved = zero if zero is None else m * zero + s * shift
    return Quantizer(kind.grid, 1.0, A, B, kind.step(s), zero, m * s, moved, storage=kind.name)


@pytest.mark.parametrize("name", TYPES)
def test_it_is_what_gguf_decodes(name):
    kind = GGML_TYPES[name]
    packed = random_blocks(kind)
    expected = torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(reference.quantized(packed, quantizer(kind, packed), torch.float32), expected)


@pytest.mark.parametrize("name", TYPES)
def test_untrained_the_bytes_come_back(name):
    kind = GGML_TYPES[name]
    packed = random_blocks(kind)
    assert torch.equal(harden(packed, quantizer(kind, packed)).blocks, packed)


@pytest.mark.parametrize("name", TYPES)
def test_what_trains_is_what_is_written(name):
    kind, generator = GGML_TYPES[name], torch.Generator().manual_seed(1)
    packed = random_blocks(kind)
    s, _ = kind.scales_and_zeros(packed, kind.grid)
    A = torch.randn(2, s.shape[1] * kind.grid.group_size, generator=generator)
    m = 1 + 0.3 * torch.randn(s.shape, generator=generator)
    B = s.abs().mean(1, keepdim=True) * torch.randn(ROWS, 2, generator=generator)
    trained = quantizer(kind, packed, m, B, A, shift=torch.randn(s.shape, generator=generator))
    weight = harden(packed, trained)
    assert not torch.equal(weight.blocks, packed)
    expected = reference.quantized(packed, trained, torch.float32)
    found = torch.from_numpy(gguf.dequantize(weight.blocks.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(found, expected)
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_d_stays_until_an_integer_leaves_its_range(name, sign):
    """m = 1.5 on a super-block's largest group, whose integer is at its limit; and on one that has room."""
    kind = GGML_TYPES[name]
    low, high = kind.quant.scale_range
    packed = random_blocks(kind)
    d = torch.full((ROWS, BLOCKS), sign * 0.01).half().float()
    put(kind, packed, "d", d)
    own = kind._numbers(packed)
    sc = own["sc"].clone()
    sc[:, 0], sc[:, 1:] = high, torch.randint(1, high // 2, sc[:, 1:].shape).float()
    packed = kind.pack(own | {"sc": sc, "codes": kind._read("codes", packed)})
    s, zero = kind.scales_and_zeros(packed, kind.grid)

    m = torch.ones_like(s)
    m[:, 1] = 1.5  # has room
    moved = kind._moved(packed, m * s, zero)
    assert torch.equal(moved["d"], d)
    assert torch.equal(moved["sc"][:, 1], (1.5 * sc[:, 1]).round())
    assert torch.equal(moved["sc"][:, 2:], sc[:, 2:])

    m[:, 0] = 1.5  # has none
    moved = kind._moved(packed, m * s, zero)
    assert torch.equal(moved["d"][:, 1:], d[:, 1:])  # of the other super-blocks
    grown = moved["d"][:, 0] / d[:, 0]
    assert ((grown >= 1.5) & (grown < 1.502)).all()
    assert (moved["sc"][:, 0] == high).all()
    assert ((moved["sc"][:, 2] * grown - sc[:, 2]).abs() <= 0.5 * grown + 1e-4).all()
    assert low <= moved["sc"].min()


@pytest.mark.parametrize("name", TYPES)
def test_a_group_of_scale_0_keeps_its_codes_and_does_not_train(name):
    kind, generator = GGML_TYPES[name], torch.Generator().manual_seed(2)
    packed = random_blocks(kind)
    put(kind, packed, "d", torch.zeros(ROWS, BLOCKS))
    s, _ = kind.scales_and_zeros(packed, kind.grid)
    assert (s == 0).all()
    A = torch.randn(2, s.shape[1] * kind.grid.group_size, generator=generator)
    trained = quantizer(kind, packed, 1.5, torch.randn(ROWS, 2, generator=generator), A)
    weight = harden(packed, trained)
    assert torch.equal(weight.codes, kind.decode(packed, kind.grid).to(torch.int8))
    if kind.grid.zero_point == "none":  # a min of its own may move
        assert torch.equal(weight.blocks, packed)
    g = torch.randn(ROWS, A.shape[1], generator=generator)
    grads = reference.weight_grads(g, {"A", "B"}, packed, trained)
    assert not grads["A"].any()
    assert not grads["B"].any()


def test_gradients_are_those_of_a_weight_in_full():
    """Of A, B, scale and zero: a file's weight is W0 = s * u + b, on the grid."""
    kind, generator = GGML_TYPES["Q4_1"], torch.Generator().manual_seed(3)
    packed = random_blocks(kind)
    put(kind, packed, "d", 0.01 + torch.rand(ROWS, BLOCKS, generator=generator))
    put(kind, packed, "m", torch.randn(ROWS, BLOCKS, generator=generator))
    A = torch.randn(2, BLOCKS * 32, generator=generator)
    s, _ = kind.scales_and_zeros(packed, kind.grid)
    B = 0.3 * s.mean(1, keepdim=True) * torch.randn(ROWS, 2, generator=generator)
    own = quantizer(kind, packed, 1.25, B, A)
    in_full = replace(own, storage="full")
    W0 = reference.quantized(packed, quantizer(kind, packed), torch.float32)
    g = torch.randn(ROWS, A.shape[1], generator=generator)
    wanted = {"A", "B", "scale", "zero"}
    found = reference.weight_grads(g.clone(), wanted, packed, own)
    expected = reference.weight_grads(g.clone(), wanted, W0, in_full)
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_numbers_that_are_none_are_seen():
    kind = GGML_TYPES["Q4_K"]
    packed = random_blocks(kind)
    assert kind.is_finite(packed)
    values = torch.ones(ROWS, BLOCKS)
    values[3, 2] = torch.nan
    put(kind, packed, "dmin", values)
    assert not kind.is_finite(packed)
