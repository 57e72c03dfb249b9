"""Rows of codes, scales and zeros as folders of quantized models have them: untrained they come back byte for byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from peft_dlqat.quant.affine import AFFINE, row_bytes
from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.fixed_point import storage_of
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.quantizer import QuantizedWeight, Quantizer, decode_stored

ROWS, GROUPS = 5, 3
GRIDS = [
    Grid(bits, 8 * bits, zero, dtype)
    for bits, zero, dtype in product(
        range(2, 9), ("none", "integer", "float"), (torch.float16, torch.bfloat16, torch.float32)
    )
]


def some_weight(grid, groups=GROUPS, seed=0):
    """With scales that are negative, subnormal and 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = ROWS, groups
    codes = torch.randint(grid.qmin, grid.qmax + 1, (ROWS, groups * grid.group_size), generator=generator)
    scale = grid.round_scale(0.1 * torch.randn(shape, generator=generator))
    scale[0, 0], scale[1, 0] = 0.0, torch.finfo(grid.scale_dtype).smallest_normal / 4
    zero = None
    if grid.zero_point == "integer":
        zero = torch.randint(grid.qmin, grid.qmax + 1, shape, generator=generator).float()
    elif grid.zero_point == "float":
        zero = grid.round_scale(torch.randn(shape, generator=generator))
    return QuantizedWeight(codes.to(torch.int8), scale, zero, grid)


def quantizer_of(packed, grid, m=1.0, B=None, moved=0.0):
    s, zero = AFFINE.scales_and_zeros(packed, grid)
    columns = s.shape[1] * grid.group_size
    A = torch.ones(1, columns)
    B = torch.zeros(len(s), 1) if B is None else B
    moved = None if zero is None else zero + moved
    return Quantizer(grid, 1.0, A, B, AFFINE.step(s), zero, m * s, moved, storage="affine")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_rows_of_an_untrained_adapter_come_back(grid):
    weight = some_weight(grid)
    packed = AFFINE.pack(weight)
    assert packed.shape == (ROWS, row_bytes(GROUPS * grid.group_size, grid))
    found = harden(packed, quantizer_of(packed, grid))
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scale, weight.scale)
    assert found.zero is None if weight.zero is None else torch.equal(found.zero, weight.zero)
    assert torch.equal(found.blocks, packed)
    assert torch.equal(decode_stored(packed, quantizer_of(packed, grid)), weight.dequantize())


@pytest.mark.parametrize("grid", GRIDS[::2], ids=str)
def test_a_trained_weight_is_what_its_rows_say(grid):
    packed = AFFINE.pack(some_weight(grid))
    trained = quantizer_of(packed, grid, m=1.3, B=0.2 * torch.randn(ROWS, 1), moved=0.3)
    found = harden(packed, trained)
    assert not torch.equal(found.blocks, packed)
    again = harden(found.blocks, quantizer_of(found.blocks, grid))
    assert torch.equal(again.dequantize(), found.dequantize())
    s, _ = AFFINE.scales_and_zeros(packed, grid)
    still = grid.group(AFFINE.decode(packed, grid)) == grid.group(found.codes)
    assert still[s == 0].all()  # a group without a scale keeps its codes
    assert not still[s != 0].all()


def test_a_row_may_be_one_group_of_any_length():
    grid = Grid(3, 45, "integer", torch.bfloat16)
    weight = some_weight(grid, groups=1)
    packed = AFFINE.pack(weight)
    assert packed.shape == (ROWS, 17 + 2 + 1)
    assert torch.equal(AFFINE.decode(packed, grid), weight.codes.float())


def test_what_grows_too_large_is_the_largest_number():
    grid = Grid(4, 32, "float", torch.float16)
    weight = some_weight(grid)
    packed = AFFINE.pack(replace(weight, scale=torch.full_like(weight.scale, 6e4)))
    scale, offset = AFFINE.ship(packed, torch.full_like(weight.scale, 9e4), torch.full_like(weight.scale, -1e9), grid)
    assert (scale == 65504).all() and (offset == -65504).all()
    lost, _ = AFFINE.ship(packed, torch.full_like(weight.scale, torch.nan), weight.zero, grid)
    assert lost.isnan().all()


def test_saved_adapters_know_it_by_its_number():
    assert storage_of(AFFINE.number) == "affine" and AFFINE.number == 200
    assert AFFINE.problem(4, 77) == ""
