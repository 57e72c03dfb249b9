"""The low-rank path with one group a row; with several, and against the exact one, see test_op."""

from __future__ import annotations

import pytest
import torch
from op_problems import ZERO_POINTS, problem

from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.op import fake_quantize_linear
from peft_dlqat.quant.quantizer import Quantizer


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_one_group_a_row(zero_point):
    grid = Grid(4, 64, zero_point, torch.float32)
    args = {name: None if value is None else value.detach() for name, value in problem(grid).items()}
    step, zero = 4 * args["step"], None if args["zero"] is None else args["zero"].round()
    found = []
    for gradient in ("exact", "lowrank"):
        torch.manual_seed(0)
        own = [tensor.clone().requires_grad_(True) for tensor in (args["A"], args["B"], torch.rand(24, 1) + 0.5)]
        decoded = own[2] * zero if zero_point == "float" else zero
        quantizer = Quantizer(grid, 0.7, *own[:2], step, zero, own[2] * step, decoded)
        fake_quantize_linear(args["x"], None, args["weight"], quantizer, gradient=gradient).square().sum().backward()
        found.append([tensor.grad for tensor in own])
    for exact, lowrank in zip(*found, strict=True):
        assert (exact - lowrank).norm() < 1e-5 * exact.norm()


def test_without_a_magnitude_the_scale_asks_for_nothing():
    """At m = 1, the others' gradients are those beside one."""
    grid = Grid(4, 32, "integer", torch.float32)
    args = {name: None if value is None else value.detach() for name, value in problem(grid).items()}
    found = []
    for trains in (True, False):
        A, B = (args[name].clone().requires_grad_(True) for name in "AB")
        scale = args["step"].clone().requires_grad_(trains)
        quantizer = Quantizer(grid, 0.7, A, B, args["step"], args["zero"], scale, args["zero"])
        fake_quantize_linear(args["x"], None, args["weight"], quantizer, gradient="lowrank").square().sum().backward()
        found.append((A.grad, B.grad))
        assert (scale.grad is not None) == trains
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
