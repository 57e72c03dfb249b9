"""Scales that are small integers times one float16 a super-block: rounding, the first of them, and training on it."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import lm_batches, tiny_model
from peft import get_peft_model

from peft_dlqat import DLQATConfig, calibrate
from peft_dlqat.layer import adapter_layers
from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.quantizer import Quantizer, round_to_nearest
from peft_dlqat.quant.super_blocks import K_QUANTS, SMALLEST_SCALE, SUPER_BLOCK, from_super_scales, super_scales

QUANTS = list(K_QUANTS.values())
each_quant = pytest.mark.parametrize("quant", QUANTS, ids=lambda quant: quant.name)
# (groups in a super-block, smallest integer, largest integer) of scales and mins.
RANGES = sorted({(SUPER_BLOCK // q.group_size, *bounds) for q in QUANTS for bounds in (q.scale_range, q.min_range)})
each_range = pytest.mark.parametrize("groups, low, high", RANGES)


def grid_of(quant):
    return Grid(quant.bits, quant.group_size, quant.zero_point, torch.float32, k_quant=True)


def config_of(quant, **kwargs):
    return DLQATConfig(
        bits=quant.bits,
        group_size=quant.group_size,
        zero_point=quant.zero_point,
        scale_dtype="k_quant",
        task_type="CAUSAL_LM",
        **kwargs,
    )


def some_scales(groups, low):
    """Scales [rows, 2 * groups] of every size that float16 times an integer holds, and some that it doesn't."""
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.arange(-40, 18).repeat_interleave(20).unsqueeze(-1)
    scales = sizes * torch.randn(len(sizes), 2 * groups, generator=generator)
    return scales if low < 0 else scales.abs()


@each_range
def test_rounding_is_to_the_nearest_that_d_allows(groups, low, high):
    scale = some_scales(groups, low)
    d, integers = super_scales(scale, groups, low, high)
    assert d.shape == (len(scale), 2) and integers.shape == scale.shape
    assert torch.equal(d, d.half().float()) and (d != 0).all()
    assert torch.equal(integers, integers.round()) and integers.min() >= low and integers.max() <= high
    if low != 0:
        assert (integers != 0).all()
    choices = torch.arange(low, high + 1)
    choices = choices[choices != 0] if low != 0 else choices
    table = d.repeat_interleave(groups, -1).unsqueeze(-1) * choices
    best = (table - scale.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((from_super_scales(d, integers) - scale).abs(), best, rtol=1e-5, atol=0)


@each_range
def test_rounding_twice_is_rounding_once(groups, low, high):
    """d and the integers are found again from the scales that they make: export packs what trained."""
    d, integers = super_scales(some_scales(groups, low), groups, low, high)
    scale = from_super_scales(d, integers)
    again = super_scales(scale, groups, low, high)
    assert torch.equal(from_super_scales(*again), scale)
    # Of the tiniest scales, d and -d may make the same.
    larger = d.abs() > SMALLEST_SCALE
    assert larger.float().mean() > 0.3 and torch.equal(again[0][larger], d[larger])


@each_range
def test_the_largest_scale_of_a_super_block_is_as_good_as_exact(groups, low, high):
    scale = some_scales(groups, low)
    blocks = scale.unflatten(-1, (-1, groups))
    rounded = from_super_scales(*super_scales(scale, groups, low, high)).unflatten(-1, (-1, groups))
    largest = blocks.abs().argmax(-1, keepdim=True)
    real, found = blocks.gather(-1, largest), rounded.gather(-1, largest)
    normal = (real.abs() > 2.0**-14 * high) & (real.abs() < 60000 * high)
    assert normal.any() and ((found - real).abs() <= 2.0**-11 * real.abs())[normal].all()


@each_range
def test_no_value_makes_nan(groups, low, high):
    for value in (0.0, -0.0, 1e-45, 1e38, -1e38):
        d, integers = super_scales(torch.full((1, groups), value), groups, low, high)
        assert d.isfinite().all() and (d != 0).all() and integers.isfinite().all()


@each_quant
def test_what_ships(quant):
    grid = grid_of(quant)
    scale, zero = initialise(torch.randn(8, 512), grid, "mse")
    assert torch.equal(grid.round_scale(scale), scale)
    A, B = torch.zeros(0, 512), torch.zeros(8, 0)
    magnitude = 1 + 0.2 * torch.randn_like(scale)
    offset = None if zero is None else magnitude * zero
    weight = harden(torch.randn(8, 512), Quantizer(grid, 1.0, A, B, scale, zero, magnitude * scale, offset))
    assert torch.equal(grid.round_scale(weight.scale), weight.scale)
    if zero is not None:
        assert torch.equal(grid.round_offset(weight.zero), weight.zero)
        assert (weight.scale > 0).all() and (weight.zero <= 0).all()


@each_quant
def test_bits_per_weight_are_those_of_the_format(quant):
    gguf = pytest.importorskip("gguf")
    size, length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant.name]]
    assert size == SUPER_BLOCK
    assert grid_of(quant).bits_per_weight() == quant.bits_per_weight == 8 * length / size


def test_bits_per_weight():
    widths = {quant.name: quant.bits_per_weight for quant in QUANTS}
    assert widths == {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}


def error(weight, grid, method="mse"):
    """Mean squared error of the first scales and zeros."""
    return (round_to_nearest(weight, *initialise(weight, grid, method), grid)[1] - weight).square().mean()


@each_quant
def test_the_first_grid_is_close_to_one_of_real_valued_scales(quant):
    """Each group's best scale is searched for by itself; rounding them together afterwards costs little."""
    weight = torch.randn(64, 512) * torch.randn(64, 512 // 64).exp().repeat_interleave(64, 1)
    free = Grid(quant.bits, quant.group_size, quant.zero_point, torch.float32)
    limit = {"Q2_K": 1.15, "Q3_K": 1.03, "Q4_K": 1.1, "Q5_K": 1.3, "Q6_K": 1.1}[quant.name]
    assert error(weight, free) < error(weight, grid_of(quant)) < limit * error(weight, free)
    assert error(weight, grid_of(quant)) < error(weight, grid_of(quant), "minmax")


@each_quant
@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_odd_groups_do_not_spoil_their_neighbours(quant, method):
    """Zeros stay zero, repeated values and values of one sign are held, and the others are as good as without them."""
    size = quant.group_size
    weight = torch.randn(4, 512)
    plain = error(weight, grid_of(quant), method)
    odd = weight.clone()
    odd[:, :size] = 0
    odd[:, size : 2 * size] = 0.5
    odd[:, 2 * size : 3 * size] = -0.5
    odd[:, 3 * size : 4 * size] = odd[:, 3 * size : 4 * size].abs() + 0.25
    odd[1, :256] = 0
    odd[2] = 0
    scale, zero = initialise(odd, grid_of(quant), method)
    w_hat = round_to_nearest(odd, scale, zero, grid_of(quant))[1]
    assert w_hat.isfinite().all() and (w_hat[odd == 0] == 0).all()
    assert (w_hat - odd)[:, : 4 * size].square().mean() < 4 * plain
    assert (w_hat - odd)[:, 4 * size :].square().mean() < 1.1 * plain


@pytest.mark.product(every=3)
@each_quant
def test_calibrating_and_training_stay_on_the_grid_and_lower_the_loss(quant):
    model = get_peft_model(tiny_model("wide llama"), config_of(quant, r=4))
    calibrate(model, lm_batches(2), steps=3, progress=False)
    for layer in adapter_layers(model)[1].values():
        grid, scale = layer.specs["default"].grid, layer.dlqat_scale["default"]
        assert grid.k_quant and torch.equal(grid.round_scale(scale), scale)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4)
    batch, losses = lm_batches(1)[0], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            loss = model.train()(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    for layer in adapter_layers(model)[1].values():
        weight = layer.quantized_weight()
        assert torch.equal(weight.grid.round_scale(weight.scale), weight.scale)
        assert not torch.equal(weight.scale, layer.dlqat_scale["default"])


def test_by_pattern_a_layer_has_another_k_quant():
    config = DLQATConfig(
        bits=2,
        group_size=16,
        zero_point="float",
        scale_dtype="k_quant",
        bits_pattern={"down_proj": 4},
        group_size_pattern={"down_proj": 32},
    )
    layers = adapter_layers(get_peft_model(tiny_model("wide llama"), config))[1]
    names = {name.rpartition(".")[2]: layer.specs["default"].grid.super_block.name for name, layer in layers.items()}
    assert names.pop("down_proj") == "Q4_K" and set(names.values()) == {"Q2_K"}


def test_any_leading_shape():
    scales = torch.randn(2, 3, 32)
    whole = from_super_scales(*super_scales(scales, 16, -32, 31))
    for i, rows in enumerate(scales):
        assert torch.equal(whole[i], from_super_scales(*super_scales(rows, 16, -32, 31)))
        assert torch.equal(whole[i, 0], from_super_scales(*super_scales(rows[0], 16, -32, 31)))
