"""Codes, scales and zeros as they ship, and the initial ones."""

from __future__ import annotations

import pytest
import torch

from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.grid import Grid, fitting_group
from peft_dlqat.quant.quantizer import Quantizer, decode_stored, store

GRIDS = [
    Grid(bits, group, zero_point, dtype)
    for bits in (2, 3, 4, 8)
    for group in (16, 64)
    for zero_point in ("none", "integer", "float")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


def rtn(weight, scale, zero, grid, magnitude=1.0):
    """The weight, rounded to nearest on the grid and multiplied by m."""
    A, B = torch.zeros(0, weight.shape[1]), torch.zeros(weight.shape[0], 0)
    out = zero if zero is None or grid.zero_point == "integer" else magnitude * zero
    return harden(weight, Quantizer(grid, 1.0, A, B, scale, zero, magnitude * scale, out))


def ident(grid):
    return f"{grid.bits}b-g{grid.group_size}-{grid.zero_point}-{str(grid.scale_dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("grid", GRIDS, ids=ident)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_fresh_grid_is_round_to_nearest(grid, method):
    """Every weight gets the code whose value is nearest to it, among all codes of its group."""
    weight = torch.randn(8, 64)
    scale, zero = initialise(weight, grid, method)
    quantized = rtn(weight, scale, zero, grid)
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
    quantized = rtn(weight, scale, zero, grid, magnitude)
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
        errors[method] = (rtn(weight, scale, zero, grid).dequantize() - weight).square().mean()
    assert errors["mse"] < 0.9 * errors["minmax"]


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("bits, group", [(3, 64), (2, 16)])
def test_importance_lowers_the_error_of_the_output(zero_point, bits, group):
    """Weighted by the inputs' second moments, the layer's output is closer; in the weight itself it may be further."""
    grid = Grid(bits, group, zero_point, torch.bfloat16)
    weight, sizes = torch.randn(32, 64), torch.randn(64).exp()
    x = torch.randn(4096, 64) * sizes

    def output_error(importance):
        w_hat = rtn(weight, *initialise(weight, grid, "mse", importance), grid).dequantize()
        return ((w_hat - weight) @ x.T).square().mean()

    assert output_error(x.square().mean(0)) < 0.9 * output_error(None)


@pytest.mark.parametrize("grid", GRIDS, ids=ident)
def test_no_scale_or_zero_nearby_is_better(grid):
    """mse ends where moving a group's scale by a twentieth, or its zero, does not help much."""
    weight = torch.randn(8, 64)
    scale, zero = initialise(weight, grid, "mse")

    def error(scale, zero):
        w_hat = rtn(weight, scale, zero, grid).dequantize()
        return grid.group((w_hat - weight).square()).sum(-1)

    found = error(scale, zero)
    for factor in (0.95, 1.05):
        moved = grid.round_scale(scale * factor)
        assert (found.sum() <= 1.02 * error(moved, zero).sum()).all()
    if grid.zero_point == "float":
        for move in (-0.1, 0.1):
            assert (found.sum() <= 1.02 * error(scale, zero + move * scale).sum()).all()


def test_a_channel_that_is_never_active_does_no_harm():
    grid = Grid(3, 16, "float", torch.bfloat16)
    weight, importance = torch.randn(8, 32), torch.ones(32)
    importance[:16] = 0
    scale, zero = initialise(weight, grid, "mse", importance)
    w_hat = rtn(weight, scale, zero, grid).dequantize()
    assert torch.allclose(w_hat, rtn(weight, *initialise(weight, grid, "mse"), grid).dequantize(), atol=1e-5)
    assert torch.isfinite(initialise(weight, grid, "mse", torch.zeros(32))[0]).all()


def test_symmetric_scale_is_signed():
    """The entry of largest magnitude takes qmin, one level more than qmax, whatever its sign."""
    grid = Grid(2, 4, "none", torch.float32)
    weight = torch.tensor([[2.0, 1.0, 0.0, -1.0], [-2.0, -1.0, 0.0, 1.0]])
    scale, zero = initialise(weight, grid, "minmax")
    assert zero is None
    assert scale.flatten().tolist() == [-1.0, 1.0]
    assert torch.equal(rtn(weight, scale, zero, grid).dequantize(), weight)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_constant_and_tiny_rows(zero_point, method, dtype):
    grid = Grid(3, 16, zero_point, dtype)
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.5), torch.randn(16) * 1e-20, torch.randn(16) * 1e3])
    scale, zero = initialise(weight, grid, method)
    w_hat = rtn(weight, scale, zero, grid).dequantize()
    assert torch.isfinite(w_hat).all() and (scale != 0).all()
    assert torch.equal(w_hat[0], torch.zeros(16))
    assert w_hat[2].abs().max() < 1e-3
    assert (w_hat[3] - weight[3]).norm() < 0.5 * weight[3].norm()


def test_initialise_in_pieces_is_the_same(monkeypatch):
    grid = Grid(3, 16, "integer", torch.bfloat16)
    weight = torch.randn(33, 32)
    whole = initialise(weight, grid, "mse")
    monkeypatch.setattr("peft_dlqat.quant.fit._CHUNK", 100)
    pieces = initialise(weight, grid, "mse")
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize(
    "in_features, asked, used",
    [
        *((256, 128, 128), (192, 96, 96), (172, 4, 4), (10, -1, 10)),  # as asked
        *((64, 128, 64), (576, 128, 64), (96, 128, 32), (96, 64, 32)),
        *((172, 128, 172), (172, 32, 172), (127, 64, 127), (192, 20, 192)),  # the row
    ],
)
def test_fitting_group(in_features, asked, used):
    assert fitting_group(in_features, asked) == used


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


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("storage, bits", [("int4", 4), ("int8", 8)])
def test_what_is_stored_has_the_same_codes_and_is_as_near_as_its_bits_allow(zero_point, storage, bits):
    grid = Grid(3, 16, zero_point, torch.bfloat16)
    weight = torch.randn(8, 64)
    scale, zero = initialise(weight, grid, "minmax")
    A, B = torch.zeros(0, 64), torch.zeros(8, 0)
    quantizer = Quantizer(grid, 1.0, A, B, scale, zero, scale, zero, storage=storage)
    packed = store(weight, quantizer)
    assert packed.dtype == torch.uint8 and packed.shape == (8, 64 * bits // 8)
    kept = decode_stored(packed, quantizer)
    assert torch.equal(rtn(kept, scale, zero, grid).codes, rtn(weight, scale, zero, grid).codes)
    off = grid.group(kept - weight).abs() / scale.abs().unsqueeze(-1)
    inside = grid.group(rtn(weight, scale, zero, grid).dequantize() - weight).abs() < 0.499 * scale.abs().unsqueeze(-1)
    assert inside.float().mean() > 0.8 and off[inside].max() <= 2.0 ** -(bits - 3 + 1) + 1e-4
