"""Triton's kernels against the reference and the float64 oracle: on a GPU or, where there is none, interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import perturb, tiny_model, tokens
from op_problems import NAMES, QUANTIZER, ZERO_POINTS, problem, quantizer_of, run, weight_of
from peft import get_peft_model

from peft_dlqat import DLQATConfig
from peft_dlqat.layer import adapter_layers
from peft_dlqat.quant import dispatch, reference
from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.op import fake_quantize_linear
from peft_dlqat.quant.quantizer import Quantizer, store, unrounded_codes

interpreter = pytest.importorskip("triton.runtime.interpreter")
gpu = pytest.importorskip("peft_dlqat.quant.nvidia")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (in_features, group_size): a part of a tile, several groups a tile, a group over two tiles, and whole rows.
SHAPES = [(48, 16), (96, 32), (64, 64), (512, 256), (60, 60), (5, 5)]


@pytest.fixture(autouse=True)
def _everything_on_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_on_nvidia", lambda weight: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(interpreter, "_convert_float", convert_float)


def convert_float(values, from_type, to_type, rounding, original=interpreter._convert_float):
    """The interpreter cuts float32 off to bfloat16, where compiled code rounds it."""
    if str(from_type) == "fp32" and str(to_type) == "bf16":
        return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
    return original(values, from_type, to_type, rounding)


@contextmanager
def by_reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_on_nvidia", lambda weight: False)
        yield


def place(args, weight_dtype=torch.float32):
    """The arguments of `problem` where the kernels run."""
    placed = {}
    for name, value in args.items():
        placed[name] = None if value is None else value.detach().to(DEVICE).requires_grad_(name != "weight")
    placed["weight"] = placed["weight"].to(weight_dtype)
    return placed


def gradients(output, args, names=NAMES):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    names = [name for name in names if args[name] is not None]
    return dict(zip(names, torch.autograd.grad((output * weights).sum(), [args[name] for name in names]), strict=True))


def assert_close(found, true, limit):
    for name, value in true.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error < limit, f"{name}: relative error {error:.1e}"


@pytest.mark.product
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n_in,group_size", SHAPES)
@pytest.mark.parametrize("in_steps", [False, True])
def test_value_and_every_gradient(zero_point, bits, n_in, group_size, in_steps):
    grid = Grid(bits, group_size, zero_point, torch.bfloat16)
    args = place(problem(grid, out=40, n_in=n_in))  # a tile of rows and a part of one
    y = run(args, grid, 2.0, in_steps)
    double = {k: None if v is None else v.detach().double().requires_grad_(True) for k, v in args.items()}
    expected = F.linear(double["x"], weight_of(double, grid, 2.0, in_steps), double["bias"])
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert_close(gradients(y, args), gradients(expected, double), 1e-5)


@pytest.mark.product
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize(
    "bits,storage", [(2, "int2"), (2, "int4"), (3, "int4"), (4, "int4"), (3, "int8"), (8, "int8")]
)
@pytest.mark.parametrize("in_steps", [False, True])
def test_packed_weights(zero_point, bits, storage, in_steps):
    grid = Grid(bits, 16, zero_point, torch.bfloat16)
    args = place(problem(grid, out=40, n_in=48))
    args["step"].requires_grad_(False)
    quantizer = quantizer_of(args, grid, 0.5, in_steps, storage)
    packed = store(args["weight"], quantizer)
    y = fake_quantize_linear(args["x"], args["bias"], packed, quantizer)
    assert torch.equal(y, fake_quantize_linear(args["x"], args["bias"], args["weight"], quantizer))
    names = ("x", "A", "B", "rounding_zero", "scale", "zero")
    with by_reference():
        expected = fake_quantize_linear(args["x"], args["bias"], packed, quantizer)
        true = gradients(expected, args, names)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert_close(gradients(y, args, names), true, 1e-5)


@pytest.mark.product
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("r", [1, 8, 64])
def test_codes_differ_only_on_an_edge(zero_point, r):
    grid = Grid(4, 32, zero_point, torch.bfloat16)
    args = place(problem(grid, out=40, n_in=160, r=r))
    quantizer = quantizer_of(args, grid, 0.5)
    codes = harden(args["weight"], quantizer).codes
    other = reference.codes(args["weight"], quantizer)
    double = Quantizer(grid, 0.5, *(None if args[name] is None else args[name].double() for name in QUANTIZER))
    unrounded = unrounded_codes(args["weight"].double(), double).flatten(-2)
    on_edge = ((unrounded - unrounded.floor()) - 0.5).abs() < 1e-5 * unrounded.abs().clamp(min=1)
    assert codes.unique().numel() == 16 and on_edge.float().mean() < 0.01
    assert torch.equal(codes[~on_edge], other[~on_edge])


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_the_merged_weight(zero_point, scale_dtype, dtype):
    """Bits of y are those of the weight that ships; gradients are exact but for the dtype's own rounding."""
    grid = Grid(3, 32, zero_point, scale_dtype)
    args = place(problem(grid, dtype=dtype, tokens=(64,)), weight_dtype=dtype)
    y = run(args, grid)
    shipped = harden(args["weight"], quantizer_of(args, grid)).dequantize().to(dtype)
    assert y.dtype == dtype and torch.equal(y, F.linear(args["x"], shipped, args["bias"]))
    double = {k: None if v is None else v.detach().double().requires_grad_(True) for k, v in args.items()}
    expected = F.linear(double["x"], weight_of(double, grid), double["bias"])
    assert_close(gradients(y, args), gradients(expected, double), 1e-2)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_a_transposed_weight_gives_the_same_bits(zero_point):
    grid = Grid(3, 32, zero_point, torch.bfloat16)
    args = place(problem(grid, out=40, n_in=160))
    quantizer = quantizer_of(args, grid)
    transposed = args["weight"].t().contiguous()
    w_hat = gpu.quantized(args["weight"], quantizer, torch.bfloat16)
    other = gpu.quantized(transposed, quantizer, torch.bfloat16, fan_in_fan_out=True)
    assert torch.equal(w_hat, other) and other.t().is_contiguous()
    assert torch.equal(harden(transposed.t(), quantizer).codes, gpu.codes(args["weight"], quantizer))
    y, z = run(args, grid), run({**args, "weight": transposed}, grid, fan_in_fan_out=True)
    assert_close(gradients(z, args), gradients(y, args), 1e-5)


@pytest.mark.parametrize("zero_point", ["integer", "float"])
@pytest.mark.parametrize("group_size", [32, 256])
def test_a_zero_that_clips_nothing_has_no_gradient(zero_point, group_size):
    grid = Grid(4, group_size, zero_point, torch.float32)
    args = place(problem(grid, n_in=512))
    step, zero = initialise(args["weight"], grid, "minmax")
    zero.requires_grad_(True)
    quantizer = Quantizer(grid, 1.0, args["A"], torch.zeros_like(args["B"]), 1.01 * step, zero, 1.01 * step, zero)
    y = fake_quantize_linear(args["x"], None, args["weight"], quantizer)
    (gradient,) = torch.autograd.grad(y.square().sum(), zero)
    inside = unrounded_codes(args["weight"], quantizer)
    nothing_clipped = ((inside >= grid.qmin) & (inside <= grid.qmax)).all(-1)
    assert nothing_clipped.any() and (gradient[nothing_clipped] == 0).all()


def test_without_a_low_rank_update():
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = place(problem(grid, r=0))
    y = run(args, grid)
    w_hat = reference.quantized(args["weight"], quantizer_of(args, grid), torch.float32)
    assert torch.allclose(y, F.linear(args["x"], w_hat, args["bias"]), rtol=1e-5, atol=1e-5)
    assert gradients(y, args, ("A", "B", "scale"))["A"].shape == (0, 64)


def test_the_lowrank_gradient():
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = place(problem(grid))
    args["step"], args["rounding_zero"] = args["step"].detach(), args["rounding_zero"].detach()
    args["scale"] = (1.5 * args["step"]).requires_grad_(True)
    found = gradients(run(args, grid, gradient="lowrank"), args, ("x", "A", "B", "scale"))
    with by_reference():
        expected = gradients(run(args, grid, gradient="lowrank"), args, ("x", "A", "B", "scale"))
    assert_close(found, expected, 1e-5)


def test_a_broken_update_shows():
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = place(problem(grid))
    with torch.no_grad():
        args["B"][3, 0] = torch.nan
    assert run(args, grid).isnan().any(0).any(0).nonzero().flatten().tolist() == [3]


@pytest.mark.product(every=2)
@pytest.mark.parametrize("storage", ["full", "int4"])
def test_a_merged_model_gives_the_same_bits(storage):
    config = DLQATConfig(bits=3, group_size=32, storage=storage, layers_to_transform=[1], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(dtype=torch.bfloat16).to(DEVICE), config).eval()
    perturb(model)
    if storage != "full":
        for layer in adapter_layers(model)[1].values():
            layer.frozen.pack("default", storage)
    ids = tokens(2, 8).to(DEVICE)
    with torch.no_grad():
        expected = model(ids).logits
        model.merge_adapter()
        assert torch.equal(model(ids).logits, expected)


def test_what_the_kernels_do_not_do_is_left_to_the_reference():
    def chosen(group_size, n_in=128, dtype=torch.float32):
        grid = Grid(3, group_size, "integer", torch.bfloat16)
        args = problem(grid, n_in=n_in)
        return dispatch.implementation(args["weight"].to(dtype), quantizer_of(args, grid))

    assert chosen(32) is gpu and chosen(129, 129) is gpu
    assert chosen(43, 129) is reference and chosen(32, dtype=torch.float64) is reference


def test_without_triton_one_warning_and_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft_dlqat.quant.nvidia", None)
    monkeypatch.delattr("peft_dlqat.quant.nvidia")
    dispatch._nvidia.cache_clear()
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    with pytest.warns(UserWarning, match="pip install triton") as caught:
        for _ in range(2):
            assert dispatch.implementation(args["weight"], quantizer_of(args, grid)) is reference
    assert len(caught) == 1
    dispatch._nvidia.cache_clear()


def test_a_cpu_has_the_reference(monkeypatch):
    monkeypatch.undo()
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    assert dispatch.implementation(args["weight"], quantizer_of(args, grid)) is reference


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")
@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernels_compile_for_a_card(arch, tmp_path):
    """What the interpreter takes the compiler need not. Nothing may spill, and nothing but the update be fused."""
    script = Path(__file__).parents[1] / "scripts" / "compile_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    found = subprocess.run(
        [sys.executable, script, "--arch", str(arch)], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    numbers = re.findall(r"(\d+) bytes of stack, (\d+) fused of (\d+)", found.stdout)
    assert len(numbers) == 36, found.stdout
    for stack, fused, expected in numbers:
        assert stack == "0" and fused == expected, found.stdout
