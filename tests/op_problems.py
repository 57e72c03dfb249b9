"""Arguments of the fused op, the op on them, and the oracle's weight."""

from __future__ import annotations

import oracle
import torch

from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.op import fake_quantize_linear
from peft_dlqat.quant.quantizer import Quantizer

NAMES = ("x", "bias", "A", "B", "step", "rounding_zero", "scale", "zero")
QUANTIZER = NAMES[2:]
ZERO_POINTS = ("none", "integer", "float")


def problem(grid, out=24, n_in=64, r=4, tokens=(2, 5), dtype=torch.float32, seed=0):
    """Arguments of the op, with a grid that clips some weights and has real-valued zeros, as while calibrating."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, n_in, generator=g)
    step, zero = initialise(weight, grid, "mse")

    def moved(tensor, size):
        return None if tensor is None else tensor + size * torch.randn(tensor.shape, generator=g)

    args = {
        "x": torch.randn(*tokens, n_in, generator=g, dtype=dtype),
        "bias": torch.randn(out, generator=g, dtype=dtype),
        "weight": weight,
        "A": 0.3 * torch.randn(r, n_in, generator=g),
        "B": 0.3 * torch.randn(out, r, generator=g),
        "step": step * (1 + 0.1 * torch.rand(step.shape, generator=g)),
        "rounding_zero": moved(zero, 0.1),
        "scale": step * moved(torch.ones_like(step), 0.2),
        "zero": moved(zero, 0.1),
    }
    for name in NAMES:
        if args[name] is not None:
            args[name].requires_grad_(True)
    return args


def quantizer_of(args, grid, scaling=1.0, in_steps=False, storage="full"):
    """The quantizer of the arguments of `problem`."""
    return Quantizer(grid, scaling, *(args[name] for name in QUANTIZER), in_steps, storage)


def run(args, grid, scaling=1.0, in_steps=False, **kwargs):
    """The op on the arguments of `problem`."""
    quantizer = quantizer_of(args, grid, scaling, in_steps)
    return fake_quantize_linear(args["x"], args["bias"], args["weight"], quantizer, **kwargs)


def weight_of(args, grid, scaling=1.0, in_steps=False):
    """The oracle's weight."""
    return oracle.fake_quantize(args["weight"], *(args[name] for name in QUANTIZER), grid, scaling, in_steps=in_steps)
