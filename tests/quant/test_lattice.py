"""Weights that lie on a grid already: scales and zeros are found again, and ordinary weights are let alone."""

from __future__ import annotations

import pytest
import torch

from peft_dlqat.quant.fit import initialise, mse
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.lattice import lattice_of, lies_on, recover
from peft_dlqat.quant.quantizer import round_to_nearest
from peft_dlqat.quant.super_blocks import K_QUANTS

CONVENTIONS = [  # bits, kind of zero, by what the largest weight is divided
    *((bits, "none", 2 ** (bits - 1) - part) for bits in (2, 3, 4, 8) for part in (1, 0.5, 0)),
    *((bits, "none", 0.75 * 2 ** (bits - 1)) for bits in (4, 8)),  # scales that training has moved
    *((bits, kind, 2**bits - 1) for bits in (2, 3, 4, 8) for kind in ("integer", "float")),
]


def on_lattice(bits, kind, divisor, group=32, rows=64, dtype=torch.float32):
    """Weights on a lattice, rounded to bfloat16, and its scales."""
    weight = torch.randn(rows, 8, group, generator=torch.Generator().manual_seed(bits)) / 50
    weight += 0.0 if kind == "none" else 0.01
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(-1, keepdim=True) if kind == "none" else high - low) / divisor
    scale = scale.to(dtype).float()
    if kind == "float":
        low = low.to(dtype).float()
        lattice = scale * ((weight - low) / scale).round().clamp(0, qmax - qmin) + low
    else:
        zero = 0 if kind == "none" else (qmin - low / scale).round()
        lattice = scale * ((weight / scale + zero).round().clamp(qmin, qmax) - zero)
    return lattice.flatten(1).bfloat16(), scale.squeeze(-1)


def relative_error(weight, grid, scale, zero):
    """Of each group, the part of its size."""
    off = round_to_nearest(weight.float(), scale, zero, grid)[1] - weight.float()
    return grid.group(off).norm(dim=-1) / grid.group(weight.float()).norm(dim=-1)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits, kind, divisor", CONVENTIONS)
def test_scales_of_a_lattice_are_found_again(bits, kind, divisor, group):
    weight, scale = on_lattice(bits, kind, divisor, group)
    grid = Grid(bits, group, kind, torch.float32)
    assert lies_on(weight, grid)
    fitted = initialise(weight, grid, "mse")
    right = (fitted[0].abs() / scale - 1).abs() < 0.01
    assert right.float().mean() > (0.98 if bits == 8 else 0.998)
    # bfloat16 has rounded the lattice by as much.
    assert relative_error(weight, grid, *fitted).max() < 2.0 ** -(7 if bits == 8 else 8)


@pytest.mark.parametrize("zero_point", ["integer", "float"])
def test_a_lattice_without_a_zero_is_found_on_grids_with_one(zero_point):
    weight, scale = on_lattice(4, "none", 7)
    grid = Grid(4, 32, zero_point, torch.float32)
    fitted = initialise(weight, grid, "mse")
    assert torch.allclose(fitted[0], scale, rtol=0.01)
    assert relative_error(weight, grid, *fitted).max() < 2.0**-8
    ordinary = mse(weight.float(), grid, torch.ones(weight.shape[1]))
    assert relative_error(weight, grid, *ordinary).median() > 2.0**-5  # which is why


def test_scales_that_ship_are_found_to_the_bit():
    weight, scale = on_lattice(4, "none", 8, dtype=torch.bfloat16)
    grid = Grid(4, 32, "none", torch.bfloat16)
    found, _ = initialise(weight, grid, "mse")
    assert torch.equal(found.abs(), scale)
    assert torch.equal(round_to_nearest(weight.float(), found, None, grid)[1].bfloat16(), weight)


def test_groups_off_the_lattice_get_what_they_always_get():
    weight, _ = on_lattice(4, "integer", 15)
    weight[::8, :32] = torch.randn(8, 32).bfloat16()
    weight[1, :32] = 0
    grid, ones = Grid(4, 32, "integer", torch.bfloat16), torch.ones(weight.shape[1])
    assert lies_on(weight, grid)
    found = recover(weight.float(), grid)[2]
    assert found.sum() == found.numel() - 9
    with_it, without = mse(weight.float(), grid, ones, lattice=True), mse(weight.float(), grid, ones)
    for ours, ordinary in zip(with_it, without, strict=True):
        assert torch.equal(ours[~found], ordinary[~found])


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("values", [(-1, 0, 1), (-3, 0, 3), (-3, 0, 6)])
def test_the_largest_of_several_scales_is_taken(values, zero_point):
    """Three values lie on finer grids, too, which would leave codes beside them that mean nothing."""
    weight = 0.01 * torch.tensor(values)[torch.randint(3, (16, 64), generator=torch.Generator().manual_seed(0))]
    grid = Grid(4, 32, zero_point, torch.float32)
    largest = 0.01 * abs(values[0])
    for scale, *_ in (recover(weight, grid), initialise(weight, grid, "mse")):
        assert torch.allclose(scale.abs(), torch.tensor(largest), rtol=1e-3)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_ordinary_weights_lie_on_no_lattice(bits, group, zero_point):
    grid = Grid(bits, group, zero_point, torch.bfloat16)
    for weight in (torch.randn(64, 256), torch.randn(64, 256).exp(), torch.rand(64, 256) - 0.5):
        assert not lies_on(weight.bfloat16(), grid)
        assert lattice_of(weight.bfloat16()) is None


def test_a_k_quants_lattice_is_found():
    quant = K_QUANTS[4, "float"]
    grid = Grid(4, 32, "float", torch.float32, k_quant=True)
    weight = torch.randn(32, 512)
    weight = round_to_nearest(weight, *initialise(weight, grid, "minmax"), grid)[1]
    assert quant.group_size == 32 and lies_on(weight, grid)
    assert relative_error(weight, grid, *initialise(weight, grid, "mse")).median() < 0.01


@pytest.mark.parametrize(
    "made, named",
    [
        ((4, "none", 7, 32), (4, "none", 32)),
        ((4, "none", 8, 128), (4, "none", 128)),
        ((4, "float", 15, 64), (4, "float", 64)),
        ((2, "none", 2, 256), (2, "none", 256)),
        ((4, "integer", 15, 32), (4, "integer", 32)),
    ],
)
def test_the_grid_that_weights_lie_on_is_named(made, named):
    grid = lattice_of(on_lattice(*made)[0])
    assert (grid.bits, grid.zero_point, grid.group_size) == named


def test_weights_that_say_nothing_lie_on_no_lattice():
    grid = Grid(4, 32, "none", torch.bfloat16)
    assert not lies_on(torch.zeros(8, 64), grid) and not lies_on(torch.full((8, 64), 0.5), grid)
    assert not lies_on(torch.tensor([0.0, 1.0]).repeat(8, 32), Grid(4, 8, "none", torch.bfloat16))
