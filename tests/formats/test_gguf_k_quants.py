"""Blocks of GGUF's K-quants, read by the gguf package, are the very weights that trained."""

from __future__ import annotations

import pytest
import torch
from conftest import perturb, tiny_model, tokens
from peft import get_peft_model

from peft_dlqat import DLQATConfig
from peft_dlqat.formats.gguf_k_quants import K_QUANT_TYPES
from peft_dlqat.layer import adapter_layers
from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.quantizer import QuantizedWeight, Quantizer

gguf = pytest.importorskip("gguf")

TYPES = list(K_QUANT_TYPES.values())
OWN = [
    (kind, Grid(kind.quant.bits, kind.quant.group_size, kind.quant.zero_point, torch.float32, k_quant=True))
    for kind in TYPES
]
# One 16-bit scale for whole super-blocks.
WHOLE = [
    (kind, grid)
    for kind in TYPES
    for grid in (
        Grid(bits, group_size, zero_point, dtype)
        for bits in (2, 3, 4, 5, 6)
        for group_size in (256, 768)
        for zero_point in ("none", "integer", "float")
        for dtype in (torch.bfloat16, torch.float16)
    )
    if kind.holds(grid)
]


def ident(value):
    if isinstance(value, Grid):
        return f"{value.bits}b-g{value.group_size}-{value.zero_point}-{value.scale_name}"
    return value.name


def quantized(grid, out=19, n_in=1536):
    """A weight with every code in it, whose magnitudes have moved."""
    weight = torch.randn(out, n_in) * torch.randn(out, 1).exp()
    scale, zero = initialise(weight, grid, "minmax")
    magnitude = 1 + 0.2 * torch.randn_like(scale)
    offset = zero if zero is None or grid.zero_point == "integer" else magnitude * zero
    A, B = torch.zeros(0, n_in), torch.zeros(out, 0)
    return harden(weight, Quantizer(grid, 1.0, A, B, scale, zero, magnitude * scale, offset))


def read(blocks, kind):
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name]))


@pytest.mark.parametrize("kind, grid", OWN + WHOLE, ids=ident)
def test_blocks_hold_the_very_weight(kind, grid):
    weight = quantized(grid)
    assert weight.codes.min() == grid.qmin and weight.codes.max() == grid.qmax
    blocks = kind.pack(weight)
    assert 8 * blocks.nbytes / weight.codes.numel() == kind.bits_per_weight
    assert torch.equal(read(blocks, kind), weight.dequantize())


@pytest.mark.parametrize("kind, grid", OWN, ids=ident)
def test_a_trained_layer_is_read_back_with_equal_logits(kind, grid):
    config = DLQATConfig(
        bits=grid.bits, group_size=grid.group_size, zero_point=grid.zero_point, scale_dtype="k_quant", r=4
    )
    model = get_peft_model(tiny_model("wide llama"), config).eval()
    perturb(model)
    read_back = tiny_model("wide llama")
    for name, layer in adapter_layers(model)[1].items():
        target = read_back.get_submodule(name.removeprefix("base_model.model."))
        target.weight.data = read(kind.pack(layer.quantized_weight()), kind)
    with torch.no_grad():
        assert torch.equal(read_back(tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize("kind, grid", OWN, ids=ident)
@pytest.mark.parametrize("row", [0, -1])
def test_every_bit_counts(kind, grid, row):
    """No byte of a block is unwritten or unread: turning over any of its bits changes the weight, or makes NaN."""
    weight = quantized(grid, n_in=256)
    blocks = kind.pack(weight)[[row]]
    before = read(blocks, kind)
    silent = 0
    for byte in range(blocks.shape[1]):
        for bit in range(8):
            changed = blocks.copy()
            changed[0, byte] ^= 1 << bit
            silent += torch.equal(read(changed, kind), before)
    assert silent == 0


def test_what_holds_what():
    held = {
        kind.name: {
            (grid.bits, grid.zero_point)
            for grid in (Grid(b, 256, z, torch.bfloat16) for b in range(2, 9) for z in ("none", "integer", "float"))
            if kind.holds(grid)
        }
        for kind in TYPES
    }
    zeros = ("none", "integer", "float")
    assert held == {
        "Q2_K": {(2, zero) for zero in zeros},
        "Q3_K": {(2, "none"), (3, "none")},
        "Q4_K": {(bits, zero) for bits in (2, 3, 4) for zero in zeros},
        "Q5_K": {(bits, zero) for bits in (2, 3, 4, 5) for zero in zeros},
        "Q6_K": {(bits, "none") for bits in (2, 3, 4, 5, 6)},
    }
    for kind, grid in OWN:
        assert [other.name for other in TYPES if other.holds(grid)] == [kind.name]
        assert not kind.holds(Grid(grid.bits, grid.group_size, grid.zero_point, torch.float16))
        assert not kind.holds(Grid(grid.bits, 256, grid.zero_point, torch.float32))


def test_a_grid_that_it_does_not_hold_is_refused():
    with pytest.raises(ValueError, match=r"Q3_K does not hold the grid .*choose another type"):
        K_QUANT_TYPES["Q3_K"].pack(quantized(Grid(3, 256, "integer", torch.bfloat16)))


@pytest.mark.parametrize("value", [1e-9, 1e6, 1 / 3])
def test_a_scale_that_float16_cannot_hold_is_refused(value):
    weight = quantized(Grid(3, 256, "none", torch.bfloat16))
    weight.scale[2, 1] = value
    with pytest.raises(ValueError, match=r"is not exact in Q3_K.*another type"):
        K_QUANT_TYPES["Q3_K"].pack(weight)


@pytest.mark.parametrize("kind, grid", OWN, ids=ident)
def test_scales_off_the_grid_are_refused(kind, grid):
    weight = quantized(grid)
    weight.scale[2, 1] *= 1.01
    with pytest.raises(ValueError, match="is not exact in"):
        kind.pack(QuantizedWeight(weight.codes, weight.scale, weight.zero, grid))
