"""What a grid says of itself; its groups and bits a weight are tested in test_quantizer and test_super_blocks."""

from __future__ import annotations

import pytest
import torch

from peft_dlqat.quant.grid import SCALE_DTYPES, Grid


@pytest.mark.parametrize("name", SCALE_DTYPES)
def test_scales_are_named_as_in_the_config(name):
    assert Grid(6, 16, "none", SCALE_DTYPES[name], name == "k_quant").scale_name == name


@pytest.mark.parametrize("bits, qmin, qmax", [(2, -2, 1), (3, -4, 3), (8, -128, 127)])
def test_codes_are_those_of_signed_integers(bits, qmin, qmax):
    grid = Grid(bits, 16, "none", torch.bfloat16)
    assert (grid.qmin, grid.qmax) == (qmin, qmax)
