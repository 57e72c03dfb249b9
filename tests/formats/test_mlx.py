"""MLX's files hold the merged model, as mlx-lm runs it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from export_models import adapted, as_id, assert_same, held, held_grids, needs

from peft_dlqat import export_model
from peft_dlqat.formats import FORMATS
from peft_dlqat.quant.grid import Grid


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", held_grids("mlx", (32, 256)), ids=as_id)
def test_mlx_holds_the_merged_model(setting, tmp_path):
    needs("mlx")
    assert_same(export_model(adapted(**setting), tmp_path / "out", "mlx"), "mlx")


@pytest.mark.parametrize("size", [32, 96, 256, -1])
def test_what_it_holds(size):
    assert held("mlx", size, torch.float32) == {*product((2, 3, 4, 8), ("none", "integer", "float"))}
    assert held("mlx", 16, torch.float32) == held("mlx", 80, torch.float32) == set()


@pytest.mark.parametrize("bits", [2, 8])
def test_bits_a_weight(bits):
    """A scale and a bias a group, of 128 weights at most; both float32 beside a zero point."""
    format = FORMATS["mlx"]
    for size, group in ((32, 32), (96, 32), (64, 64), (256, 128)):
        assert format.stored_as(Grid(bits, size, "none", torch.bfloat16))[1] == bits + 32 / group
        assert format.stored_as(Grid(bits, size, "integer", torch.bfloat16))[1] == bits + 64 / group
