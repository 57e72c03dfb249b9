"""Corners of the first scales and zeros; what they are good for is tested in test_quantizer and test_super_blocks."""

from __future__ import annotations

import pytest
import torch

from peft_dlqat.quant.fit import initialise, snap
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.quantizer import round_to_nearest
from peft_dlqat.quant.super_blocks import SMALLEST_SCALE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_a_scale_of_0_becomes_float16s_smallest_normal_number(zero_point, dtype):
    zero = None if zero_point == "none" else torch.zeros(1, 2)
    scale, _ = snap(torch.tensor([[0.0, 1.0]]), zero, Grid(3, 16, zero_point, dtype))
    assert scale.tolist() == [[torch.finfo(torch.float16).smallest_normal, 1.0]]


def test_a_k_quants_scale_of_0_becomes_the_smallest():
    scale, _ = snap(torch.zeros(1, 16), None, Grid(6, 16, "none", torch.float32, k_quant=True))
    assert scale.abs().unique().tolist() == [SMALLEST_SCALE]


@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_an_offset_far_from_zero_costs_no_precision(mean):
    grid, weight = Grid(8, 64, "float", torch.float32), torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for init in ("mse", "minmax"):
        scale, zero = initialise(weight.double().add(mean).float(), grid, init)
        w_hat = round_to_nearest(weight.double().add(mean).float(), scale, zero, grid)[1]
        errors.append((w_hat.double() - mean - weight.double()).square().mean().item())
    assert errors[0] < 1.01 * errors[1]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_least_squares_is_nearly_what_trying_everything_finds(bits, zero_point):
    grid = Grid(bits, 32, zero_point, torch.float32)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator)
    importance = torch.randn(32, generator=generator).exp()

    def error(scale, zero):
        return (importance * (round_to_nearest(weight, scale, zero, grid)[1] - weight).square()).sum(-1, keepdim=True)

    scale, zero = initialise(weight, grid, "mse", importance)
    found, least = error(scale, zero), torch.full((64, 1), torch.inf)
    largest = weight.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    zeros = {
        "none": [None],
        "integer": [torch.full((64, 1), float(z)) for z in range(grid.qmin, grid.qmax + 1)],
        "float": [part * largest for part in torch.linspace(-0.6, 0.6, 13)],
    }
    for share in torch.linspace(0.3, 1.2, 90):
        for sign in (1, -1) if zero_point == "none" else (1,):
            for tried in zeros[zero_point]:
                least = torch.minimum(least, error(sign * share * largest, tried))
    assert found.sum() < 1.05 * least.sum()
