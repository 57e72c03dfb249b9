"""Triton's kernels against the reference and the float64 oracle: on a GPU or, where there is none, interpreted."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
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
kernels, triton, tl = gpu.kernels, gpu.triton, gpu.tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (in_features, group_size): a part of a tile, several groups a tile, a group over two tiles, and whole rows.
SHAPES = [(48, 16), (96, 32), (64, 64), (512, 256), (60, 60), (5, 5)]


@pytest.fixture(autouse=True)
def _everything_on_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_on_nvidia", lambda weight: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(interpreter, "_convert_float", convert_float)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def convert_float(values, from_type, to_type, rounding, original=interpreter._convert_float):
    """The interpreter cuts float32 off to bfloat16, where compiled code rounds it."""
    if str(from_type) == "fp32" and str(to_type) == "bf16":
        return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
    return original(values, from_type, to_type, rounding)


def fused(x, y, z):
    """x * y + z in float32, rounded once: in float64, and there to odd, which loses nothing that float32 needs."""
    with np.errstate(all="ignore"):
        product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = product + z
        other = total - product
        error = (product - (total - other)) + (z - other)  # Knuth's, of the sum; the product is exact
        even = (total.view(np.int64) & 1) == 0
        toward = np.where(error > 0, np.inf, -np.inf)
        total = np.where(np.isfinite(error) & (error != 0) & even, np.nextafter(total, toward), total)
        return total.astype(np.float32)


def create_fma(builder, x, y, z):
    """Some versions of the interpreter round the product."""
    return interpreter.TensorHandle(fused(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)


def create_dot(builder, a, b, d, *_):
    """In the order that compiled code has, which `test_the_kernels_compile_for_a_card` reads; numpy has its own."""
    return interpreter.TensorHandle(chain(a.data, b.data, d.data), d.dtype.scalar)


def chain(a, b, total):
    """total + a @ b, by fused multiply-adds in the order of the ranks."""
    for k in range(a.shape[1]):
        total = fused(*np.broadcast_arrays(a[:, k : k + 1], b[k : k + 1], total))
    return total


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
@pytest.mark.parametrize("r", [1, 5, 8, 16, 24])
def test_codes_are_those_of_the_chain(zero_point, r):
    """To the last one, whatever the rank: what is trained on one tile or card is what another merges."""
    grid = Grid(4, 32, zero_point, torch.float32)
    args = place(problem(grid, out=70, n_in=96, r=r))
    update = chain(args["B"].detach().cpu().numpy(), args["A"].detach().cpu().numpy(), np.zeros((70, 96), np.float32))
    unrounded = grid.group(args["weight"].cpu() + torch.from_numpy(update) * 0.7)
    step, zero = (None if args[name] is None else args[name].detach().cpu() for name in ("step", "rounding_zero"))
    if zero_point == "float":
        unrounded = (unrounded - zero[:, :, None]) / step[:, :, None]
    else:
        unrounded = unrounded / step[:, :, None]
        unrounded = unrounded + (0 if zero is None else zero.round()[:, :, None])
    expected = unrounded.round().clamp(grid.qmin, grid.qmax).flatten(-2)
    quantizer = quantizer_of(args, grid, 0.7)
    codes = gpu.codes(args["weight"], quantizer)
    assert torch.equal(codes.cpu(), expected.to(torch.int8)) and codes.unique().numel() == 16
    shipped = harden(args["weight"], quantizer).dequantize()
    assert torch.equal(gpu.quantized(args["weight"], quantizer, torch.float32), shipped)


@triton.jit
def divide_all(values, divisors, result, SIZE: tl.constexpr):
    """SIZE by SIZE quotients."""
    index = tl.arange(0, SIZE)
    quotients = gpu_divide(
        tl.load(values + index)[None, :] + tl.zeros((SIZE, 1), tl.float32), tl.load(divisors + index)[:, None]
    )
    tl.store(result + index[:, None] * SIZE + index[None, :], quotients)


gpu_divide = kernels._divide


@pytest.mark.parametrize("seed", range(4))
def test_quotients_are_ieee_754s(seed):
    """Of any two bit patterns; those that round to the same code for any zero may differ."""
    random = np.random.default_rng(seed)
    values, divisors = (random.integers(0, 2**32, 256, np.uint32).view(np.float32) for _ in range(2))
    edges = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        1e-45,
        1.1754944e-38,
        3.4028235e38,
        1.0,
        1.9999999,
        2.0**-60,
        2.0**60,
    ]
    values[:12], divisors[:12] = edges, edges
    if seed:  # as weights and steps are
        values[12:] = random.normal(size=244) * 10.0 ** random.integers(-20, 6, 244)
        divisors[12:] = (1.0 + random.random(244)) * 10.0 ** random.integers(-20, 6, 244)
        values[12:100] = divisors[12:100] * random.integers(-300, 300, 88) / 2  # on edges between codes, nearly
    found = torch.empty(256, 256, device=DEVICE)
    with np.errstate(all="ignore"):
        arguments = [torch.from_numpy(numbers).to(DEVICE) for numbers in (values, divisors)]
        divide_all[(1,)](*arguments, found, 256, enable_fp_fusion=False)
    found = found.cpu().numpy()
    with np.errstate(all="ignore"):
        expected = values[None, :] / divisors[:, None]
        expected[np.isinf(divisors)] = np.nan  # a training that has broken shows it
        for zero in (0.0, 1.0, -3.0):
            codes, true = (
                np.clip(np.rint(quotients + np.float32(zero)), -128, 127) for quotients in (found, expected)
            )
            assert np.array_equal(codes, true, equal_nan=True)
        matter = (np.abs(expected) < 2.0**24) & (np.abs(expected) > 2.0**-30)
    assert matter.mean() > 0.05 and np.array_equal(found[matter], expected[matter])


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
        return dispatch.implementation(args["weight"].to(DEVICE, dtype), quantizer_of(args, grid))

    assert chosen(32) is gpu and chosen(129, 129) is gpu
    assert chosen(43, 129) is reference and chosen(32, dtype=torch.float64) is reference


@pytest.fixture
def undecided():
    """A process that has not yet asked who computes the weight."""
    dispatch._nvidia.cache_clear()
    yield
    dispatch._nvidia.cache_clear()


def assert_one_warning_and_the_reference(match):
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    with pytest.warns(UserWarning, match=match) as caught:
        for _ in range(2):
            assert dispatch.implementation(args["weight"], quantizer_of(args, grid)) is reference
    assert len(caught) == 1


def test_without_triton_one_warning_and_the_reference(monkeypatch, undecided):
    monkeypatch.setitem(sys.modules, "peft_dlqat.quant.nvidia", None)
    monkeypatch.delattr("peft_dlqat.quant.nvidia")
    assert_one_warning_and_the_reference("pip install triton")


def test_where_no_kernel_compiles_one_warning_and_the_reference(monkeypatch, undecided):
    class Kernel:
        def __getitem__(self, tiles):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "quantize", Kernel())
    assert_one_warning_and_the_reference("RuntimeError: Failed to find C compiler")
    monkeypatch.undo()  # a compiler comes too late: what is trained is what is merged
    monkeypatch.setattr(dispatch, "_on_nvidia", lambda weight: True)
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    assert dispatch.implementation(args["weight"], quantizer_of(args, grid)) is reference


def test_a_kernel_that_fails_after_others_ran_is_an_error(monkeypatch, undecided):
    """Plain torch in its place would mix two roundings in one model."""
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = place(problem(grid))
    run(args, grid)
    monkeypatch.setattr(kernels, "quantize", {})
    with pytest.raises(KeyError):
        run(args, grid)


def test_a_cpu_has_the_reference(monkeypatch):
    monkeypatch.undo()
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    assert dispatch.implementation(args["weight"], quantizer_of(args, grid)) is reference


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")
@pytest.mark.parametrize(("arch", "zero_points"), [(80, ["integer"]), (90, ["none", "float"])])
def test_the_kernels_compile_for_a_card(arch, zero_points, tmp_path):
    """What the interpreter takes the compiler need not. Nothing may spill; update and division alone are fused."""
    script = Path(__file__).parents[1] / "scripts" / "compile_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    found = subprocess.run(
        [sys.executable, script, "--arch", str(arch), "--zero-points", *zero_points],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    numbers = re.findall(r"(\d+) bytes of stack, (\d+) fused of (\d+)", found.stdout)
    assert len(numbers) == 16 * len(zero_points), found.stdout
    for stack, fused, expected in numbers:
        assert stack == "0" and fused == expected, found.stdout
