"""Codes, scales and zeros as they ship, and the initial grids."""

from __future__ import annotations

import pytest
import torch

from peft_dlqat import Grid
from peft_dlqat.grid import largest_group
from peft_dlqat.initialisation import initialise
from peft_dlqat.qweight import harden

GRIDS = [
    Grid(bits, group, zero_point, dtype)
    for bits in (2, 3, 4, 8)
    for group in (16, 64)
    for zero_point in ("none", "integer", "float")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


def ident(grid):
    return f"{grid.bits}b-g{grid.group_size}-{grid.zero_point}-{str(grid.scale_dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("grid", GRIDS, ids=ident)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_fresh_grid_is_round_to_nearest(grid, method):
    """Every weight gets the code whose value is nearest to it, among all codes of its group."""
    weight = torch.randn(8, 64)
    scale, zero = initialise(weight, grid, method)
    quantized = harden(weight, scale, zero, torch.ones_like(scale), grid)
    levels = torch.arange(grid.qmin, grid.qmax + 1)
    table = torch.stack(
        [
            type(quantized)(
                torch.full((8, 64), c, dtype=torch.int8), quantized.scale, quantized.zero, grid
            ).dequantize()
            for c in levels.tolist()
        ]
    )
    nearest = (table - weight).abs().amin(0)
    assert torch.allclose((quantized.dequantize() - weight).abs(), nearest, atol=1e-4 * scale.abs().max().item())


@pytest.mark.parametrize("grid", GRIDS, ids=ident)
def test_what_ships_is_on_the_grid(grid):
    weight = torch.randn(8, 64)
    scale, zero = initialise(weight, grid, "mse")
    magnitude = 1 + 0.2 * torch.randn_like(scale)
    quantized = harden(weight, scale, zero, magnitude, grid)
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes.min() >= grid.qmin and quantized.codes.max() <= grid.qmax
    assert torch.equal(quantized.scale, quantized.scale.to(grid.scale_dtype).float())
    if grid.zero_point == "integer":
        assert torch.equal(quantized.zero, quantized.zero.round())
        assert quantized.zero.min() >= grid.qmin and quantized.zero.max() <= grid.qmax
    if grid.zero_point == "float":
        assert torch.equal(quantized.zero, quantized.zero.to(grid.scale_dtype).float())


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_mse_is_better_than_minmax(zero_point):
    grid = Grid(3, 64, zero_point, torch.bfloat16)
    weight = torch.randn(64, 128)
    errors = {}
    for method in ("minmax", "mse"):
        scale, zero = initialise(weight, grid, method)
        errors[method] = (
            (harden(weight, scale, zero, torch.ones_like(scale), grid).dequantize() - weight).square().mean()
        )
    assert errors["mse"] < 0.9 * errors["minmax"]


def test_symmetric_scale_is_signed():
    """The entry of largest magnitude takes qmin, one level more than qmax, whatever its sign."""
    grid = Grid(2, 4, "none", torch.float32)
    weight = torch.tensor([[2.0, 1.0, 0.0, -1.0], [-2.0, -1.0, 0.0, 1.0]])
    scale, zero = initialise(weight, grid, "minmax")
    assert zero is None
    assert scale.flatten().tolist() == [-1.0, 1.0]
    assert torch.equal(harden(weight, scale, zero, torch.ones_like(scale), grid).dequantize(), weight)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_constant_and_tiny_rows(zero_point, method, dtype):
    grid = Grid(3, 16, zero_point, dtype)
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.5), torch.randn(16) * 1e-20, torch.randn(16) * 1e3])
    scale, zero = initialise(weight, grid, method)
    w_hat = harden(weight, scale, zero, torch.ones_like(scale), grid).dequantize()
    assert torch.isfinite(w_hat).all() and (scale != 0).all()
    assert torch.equal(w_hat[0], torch.zeros(16))
    assert w_hat[2].abs().max() < 1e-3
    assert (w_hat[3] - weight[3]).norm() < 0.5 * weight[3].norm()


def test_initialise_in_pieces_is_the_same(monkeypatch):
    grid = Grid(3, 16, "integer", torch.bfloat16)
    weight = torch.randn(33, 32)
    whole = initialise(weight, grid, "mse")
    monkeypatch.setattr("peft_dlqat.initialisation._CHUNK", 100)
    pieces = initialise(weight, grid, "mse")
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize(
    "in_features, asked, used", [(64, 128, 64), (172, 128, 86), (172, 32, 4), (127, 64, 1), (10, -1, 10), (96, 64, 48)]
)
def test_largest_group(in_features, asked, used):
    assert largest_group(in_features, asked) == used


@pytest.mark.parametrize(
    "grid, bpw",
    [
        (Grid(3, 128, "integer", torch.bfloat16), 3 + 19 / 128),
        (Grid(4, 32, "none", torch.float16), 4.5),
        (Grid(4, 32, "float", torch.float16), 5.0),
        (Grid(2, 64, "none", torch.float32), 2.5),
    ],
)
def test_bits_per_weight(grid, bpw):
    assert grid.bits_per_weight() == pytest.approx(bpw)
