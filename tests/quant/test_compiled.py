"""The op's arithmetic through torch.compile: the same bits as plain torch's."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from conftest import lm_batches, perturb, tiny_model, train
from op_problems import NAMES, problem
from peft import get_peft_model

import peft_dlqat
from peft_dlqat import DLQATConfig, Grid, calibrate
from peft_dlqat.layer import adapter_layers
from peft_dlqat.quant import compiled, dispatch, reference
from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.op import fake_quantize_linear
from peft_dlqat.quant.quantizer import Quantizer, unrounded_codes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
    ),
]


@pytest.fixture(autouse=True)
def _compiled():
    torch.compiler.reset()  # the limit of shapes is of the whole process
    peft_dlqat.compile_on_cpu()
    yield
    peft_dlqat.compile_on_cpu(False)
    torch.compiler.reset()


def results(args, grid, stored_bits, in_grid_units):
    """w_hat as the op multiplies with it, codes, and all gradients."""
    given = [name for name in NAMES if args[name] is not None]
    for name in given:
        args[name].grad = None
    quantizer = Quantizer(*(args[name] for name in NAMES[2:]), in_grid_units, stored_bits)
    y = fake_quantize_linear(args["x"], args["bias"], args["weight"], quantizer, grid, 0.7)
    y.square().sum().backward()
    hardened = harden(args["weight"], quantizer, grid, 0.7)
    return y.detach(), hardened, {name: args[name].grad for name in given}


GRIDS = {
    "float16": Grid(3, 16, "float", torch.float16),
    "bfloat16": Grid(2, 16, "integer", torch.bfloat16),
    "float32": Grid(4, 16, "none", torch.float32),
    "k_quant": Grid(4, 32, "float", torch.float32, k_quant=True),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("stored_bits", [0, 4])
@pytest.mark.parametrize("in_grid_units", [False, True])
def test_compiled_arithmetic_gives_the_same_bits(grid, stored_bits, in_grid_units):
    """Of codes and w_hat, and so of y; sums over a group add up in another order."""
    args = problem(grid, n_in=256)
    assert dispatch.implementation(args["weight"], None, grid) is not reference
    y, hardened, grads = results(args, grid, stored_bits, in_grid_units)
    peft_dlqat.compile_on_cpu(False)
    assert dispatch.implementation(args["weight"], None, grid) is reference
    plain_y, plain_hardened, plain_grads = results(args, grid, stored_bits, in_grid_units)
    assert torch.equal(y, plain_y)
    assert torch.equal(hardened.codes, plain_hardened.codes)
    for name in grads:
        torch.testing.assert_close(grads[name], plain_grads[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("stored_bits", [0, 8])
@pytest.mark.parametrize("in_grid_units", [False, True])
@torch.no_grad()
def test_what_is_rounded_has_the_same_bits(grid, stored_bits, in_grid_units):
    """Codes hide a difference in the last bit, until a weight lies on the edge between two."""
    args = problem(grid, n_in=256)
    quantizer = Quantizer(*(args[name] for name in NAMES[2:]), in_grid_units, stored_bits)
    arguments = (args["weight"], quantizer, grid, 0.7)
    assert torch.equal(compiled._compile(unrounded_codes)(*arguments), unrounded_codes(*arguments))


@pytest.mark.parametrize("storage", ["full", "int8"])
def test_a_model_that_trained_compiled_merges_into_what_it_computed(storage):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, storage=storage, task_type="CAUSAL_LM"))
    calibrate(model, lm_batches(2), steps=0, progress=False)
    perturb(model)
    factors = [layer.dlqat_B["default"] for layer in adapter_layers(model)[1].values()]
    before = [factor.clone() for factor in factors]
    train(model)
    assert not any(map(torch.equal, before, factors))
    batch = {"input_ids": lm_batches(1)[0]["input_ids"]}
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        assert torch.equal(model.merge_and_unload()(**batch).logits, trained)


def test_a_machine_without_a_compiler_says_so_at_once(monkeypatch):
    dispatch._check_compiler.cache_clear()
    peft_dlqat.compile_on_cpu(False)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: (_ for _ in ()).throw(OSError("no g++")))
    with pytest.raises(RuntimeError, match=r"no g\+\+.*leave compile_on_cpu\(\) out"):
        peft_dlqat.compile_on_cpu()
    assert dispatch._compiled is None
