"""Corners of the first scales and zeros; what they are good for is tested in test_quantizer and test_super_blocks."""

from __future__ import annotations

import pytest
import torch

from peft_dlqat.quant.fit import snap
from peft_dlqat.quant.grid import Grid
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
