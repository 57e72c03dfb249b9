"""The fused op against a float64 autograd account of the formula, in value, gradients and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_problems import NAMES, QUANTIZER, ZERO_POINTS, problem, run, weight_of
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_dlqat import DLQATConfig
from peft_dlqat.quant import reference
from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.op import _compiled_forward, fake_quantize_linear
from peft_dlqat.quant.quantizer import Quantizer, unrounded_codes
from peft_dlqat.quant.super_blocks import K_QUANTS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("in_steps", [False, True])
def test_value_and_every_gradient(zero_point, bits, group_size, scale_dtype, in_steps):
    check_value_and_every_gradient(Grid(bits, group_size, zero_point, scale_dtype), in_steps)


@pytest.mark.parametrize("quant", K_QUANTS.values(), ids=lambda quant: quant.name)
@pytest.mark.parametrize("in_steps", [False, True])
def test_value_and_every_gradient_of_k_quants(quant, in_steps):
    grid = Grid(quant.bits, quant.group_size, quant.zero_point, torch.float32, k_quant=True)
    check_value_and_every_gradient(grid, in_steps, n_in=512)


def check_value_and_every_gradient(grid, in_steps, **size):
    """The op's, against those of the oracle in float64."""
    args = problem(grid, **size)
    y = run(args, grid, 2.0, in_steps)
    double = {k: None if v is None else v.detach().double().requires_grad_(True) for k, v in args.items()}
    expected = F.linear(double["x"], weight_of(double, grid, 2.0, in_steps), double["bias"])
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for name in NAMES:
        if args[name] is None:
            continue
        found, true = args[name].grad.double(), double[name].grad
        error = (found - true).norm() / true.norm()
        assert error < 1e-5, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("zero_point", ["integer", "float"])
def test_a_zero_that_clips_nothing_has_no_gradient(zero_point):
    """Exactly none, since Adam makes full steps of whatever is left."""
    grid = Grid(4, 32, zero_point, torch.float32)
    args = problem(grid)
    args["B"] = torch.zeros_like(args["B"])
    step, zero = initialise(args["weight"].detach(), grid, "minmax")
    zero = zero.requires_grad_(True)
    quantizer = Quantizer(grid, 1.0, args["A"], args["B"], 1.01 * step, zero, 1.01 * step, zero)
    y = fake_quantize_linear(args["x"], None, args["weight"], quantizer)
    (y * torch.randn(y.shape)).sum().backward()
    inside = unrounded_codes(args["weight"], quantizer)
    nothing_clipped = ((inside >= grid.qmin) & (inside <= grid.qmax)).all(-1)
    assert nothing_clipped.any() and (zero.grad[nothing_clipped] == 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_grid_are_inside(bits, dtype):
    grid = Grid(bits, 4, "none", torch.float32)
    ends = torch.tensor([grid.qmin, grid.qmax], dtype=dtype)
    beyond, within = (torch.nextafter(ends, sign * torch.tensor([-torch.inf, torch.inf])) for sign in (1, -1))
    assert reference._inside(torch.ones(6, dtype=dtype), torch.cat([beyond, ends, within]), grid).tolist() == [
        0, 0, 1, 1, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_some_weights_are_clipped(zero_point):
    """The gradient tests would prove nothing about the clip's mask if no weight were clipped."""
    grid = Grid(3, 32, zero_point, torch.bfloat16)
    args = problem(grid)
    latent = args["weight"] + 2.0 * args["B"] @ args["A"]
    w = grid.group(latent)
    z = None if args["rounding_zero"] is None else args["rounding_zero"].unsqueeze(-1)
    s = args["step"].unsqueeze(-1)
    t = (w - z) / s if zero_point == "float" else w / s + (z.round() if zero_point == "integer" else 0)
    share = ((t < grid.qmin) | (t > grid.qmax)).float().mean()
    assert 0.01 < share < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_runs_in_its_own_dtype(dtype):
    """y is exactly F.linear of the float32 weight rounded once to the input's dtype."""
    grid = Grid(4, 32, "integer", torch.bfloat16)
    args = problem(grid, dtype=dtype)
    y = run(args, grid)
    assert y.dtype == dtype
    w_hat = weight_of({k: v.detach() for k, v in args.items()}, grid)
    assert torch.equal(y, F.linear(args["x"], w_hat.to(dtype), args["bias"]))
    y.float().sum().backward()
    assert args["x"].grad.dtype == dtype and args["A"].grad.dtype == torch.float32


def test_float16_sums_over_tokens_do_not_overflow():
    """Under loss scaling dL/dw_hat may be beyond float16's largest number, where the gradients of x and A are not."""
    grid = Grid(4, 32, "integer", torch.bfloat16)
    args = problem(grid, tokens=(4096,), dtype=torch.float16)
    args["x"].data.fill_(1.0)
    run(args, grid).backward(torch.full((4096, 24), 32.0, dtype=torch.float16))
    exact = {
        name: None if value is None else value.detach().float().requires_grad_(True) for name, value in args.items()
    }
    run(exact, grid).backward(torch.full((4096, 24), 32.0))
    assert exact["scale"].grad.abs().max() > 65504
    for name in ("A", "B", "scale"):
        torch.testing.assert_close(args[name].grad, exact[name].grad, rtol=2e-3, atol=1e-2)


def test_only_the_asked_gradients_are_computed():
    grid = Grid(4, 32, "integer", torch.bfloat16)
    args = problem(grid)
    for name in ("x", "bias", "step", "rounding_zero", "scale", "zero"):
        args[name].requires_grad_(False)
    run(args, grid).sum().backward()
    assert args["A"].grad is not None and args["B"].grad is not None
    assert all(args[name].grad is None for name in ("x", "bias", "step", "rounding_zero", "scale", "zero"))


@pytest.mark.parametrize("tokens", [(3,), (0,), (2, 3, 4), ()])
def test_any_leading_shape(tokens):
    grid = Grid(4, 32, "float", torch.float32)
    args = problem(grid, tokens=tokens)
    y = run(args, grid)
    assert y.shape == (*tokens, 24)
    y.sum().backward()
    assert args["x"].grad.shape == args["x"].shape


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_rows_in_pieces_give_the_same(zero_point, fan_in_fan_out, monkeypatch):
    grid = Grid(3, 32, zero_point, torch.bfloat16)
    results = []
    for piece in (2**20, 7 * 64):
        monkeypatch.setattr("peft_dlqat.quant.quantizer._PIECE", piece)
        args = problem(grid)
        if fan_in_fan_out:
            args["weight"] = args["weight"].t().contiguous()
        y = run(args, grid, fan_in_fan_out=fan_in_fan_out)
        y.square().sum().backward()
        results.append({"y": y, **{name: args[name].grad for name in NAMES if args[name] is not None}})
    for name, whole in results[0].items():
        assert torch.allclose(whole, results[1][name], rtol=1e-4, atol=1e-5 * whole.abs().max().item()), name
    assert torch.equal(results[0]["y"], results[1]["y"])


def test_transposed_weight_gives_the_same_result():
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    y = run(args, grid)
    y.sum().backward()
    grads = {name: args[name].grad.clone() for name in NAMES}
    other = problem(grid)
    other["weight"] = other["weight"].t().contiguous()
    z = run(other, grid, fan_in_fan_out=True)
    z.sum().backward()
    assert torch.allclose(y, z, rtol=1e-5, atol=1e-5)
    for name in NAMES:
        assert torch.allclose(grads[name], other[name].grad, rtol=1e-4, atol=1e-4), name


def test_nothing_of_the_weights_size_is_kept_for_backward():
    """Through a layer, magnitude and all: beside the input, only what has a number a group."""
    layer = nn.Linear(1024, 1024)
    config = DLQATConfig(bits=3, group_size=128, r=16, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    x = torch.randn(256, 1024)
    own = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    input_bytes = x.numel() * x.element_size()
    assert input_bytes <= sum(saved.values()) <= 1.1 * input_bytes
    y.sum().backward()


def test_the_second_derivative_is_refused_not_wrong():
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(run(args, grid).sum(), args["x"], create_graph=True)


@pytest.mark.parametrize("gradient", ["exact", "lowrank"])
def test_compiled_and_eager_give_the_same_bits(gradient):
    grid = Grid(3, 64, "none", torch.bfloat16)
    found = {}
    for name, call in (("eager", run), ("compiled", torch.compile(run, backend="aot_eager", fullgraph=True))):
        args = problem(grid)
        y = call(args, grid, gradient=gradient)
        y.sum().backward()
        found[name] = [y, *(args[key].grad for key in ("x", "bias", "A", "B", "scale"))]
    assert all(torch.equal(*pair) for pair in zip(found["eager"], found["compiled"], strict=True))


def constants_of(grid, scaling):
    """The custom op's arguments after its tensors."""
    numbers = (grid.bits, grid.group_size, grid.zero_point, grid.scale_dtype, grid.k_quant)
    return (*numbers, scaling, False, "full", False, "exact")


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_the_op_passes_torchs_own_checks(zero_point):
    """Schema, fake tensors and autograd registration, which torch.compile relies on."""
    grid = Grid(3, 32, zero_point, torch.bfloat16)
    args = problem(grid)
    tensors = (args[k] for k in ("x", "bias", "weight", *QUANTIZER))
    torch.library.opcheck(_compiled_forward, (*tensors, *constants_of(grid, 2.0)))


def test_compiled_backward_knows_the_strides_of_an_input_that_is_not_contiguous():
    """Under inductor's assertions, which neither opcheck nor aot_eager make."""
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = {name: value if value is None else value.detach() for name, value in problem(grid).items()}
    x = torch.randn(2, 64, 5).transpose(1, 2)
    given = (torch.randn(2, 5, 24), [True] + [False] * 8, None, x, *(args[k] for k in ("bias", "weight", *QUANTIZER)))
    backward = torch.ops.peft_dlqat.fake_quantize_linear_backward
    real = backward(*given, *constants_of(grid, 1.0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in given]
        fake = backward(*fakes, *constants_of(grid, 1.0))
    assert [t.stride() for t in fake] == [t.stride() for t in real] and not x.is_contiguous()


def test_the_lowrank_gradient_of_a_magnitude_of_zero_is_a_number():
    grid = Grid(3, 32, "none", torch.bfloat16)
    args = {name: None if value is None else value.detach() for name, value in problem(grid).items()}
    m = torch.ones(24, 1).index_fill(0, torch.tensor([3]), 0.0).requires_grad_(True)
    quantizer = Quantizer(grid, 1.0, args["A"], args["B"], args["step"], None, m * args["step"], None)
    fake_quantize_linear(args["x"], None, args["weight"], quantizer, gradient="lowrank").sum().backward()
    assert m.grad.isfinite().all() and m.grad.count_nonzero() == 23


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("clips", [False, True])
def test_the_lowrank_gradient_only_lacks_the_mask_of_the_clip(zero_point, fan_in_fan_out, clips):
    """Exact where nothing is clipped; the magnitude's, the offset's and the input's always."""
    grid = Grid(4, 32, zero_point, torch.float32)
    args = {name: None if value is None else value.detach() for name, value in problem(grid).items()}
    step = args["step"] * (1 if clips else 4)
    zero = None if args["zero"] is None else args["zero"].round()
    weight = args["weight"].t().contiguous() if fan_in_fan_out else args["weight"]
    found = {}
    for gradient in ("exact", "lowrank"):
        own = {name: args[name].clone().requires_grad_(True) for name in ("x", "bias", "A", "B")}
        own["m"] = torch.linspace(0.5, 2, 24).unsqueeze(1).requires_grad_(True)
        decoded = zero
        if zero_point == "float":
            own["shift"] = torch.linspace(-1, 1, 48).view(24, 2).requires_grad_(True)
            decoded = own["m"] * zero + step * own["shift"]
        quantizer = Quantizer(grid, 0.7, own["A"], own["B"], step, zero, own["m"] * step, decoded)
        y = fake_quantize_linear(own["x"], own["bias"], weight, quantizer, fan_in_fan_out, gradient)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found[gradient] = {name: tensor.grad for name, tensor in own.items()}
    for name, exact in found["exact"].items():
        error = (found["lowrank"][name] - exact).norm() / exact.norm()
        assert (error > 1e-3) if clips and name in ("A", "B") else (error < 1e-5), f"{name}: {error:.1e}"


def test_the_bf16_gradient_is_the_exact_one_to_bf16():
    grid = Grid(3, 32, "integer", torch.bfloat16)
    grads = {}
    for gradient in ("exact", "bf16"):
        args = problem(grid, tokens=(64,))
        y = run(args, grid, gradient=gradient)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        grads[gradient] = {name: args[name].grad for name in NAMES}
    assert torch.equal(grads["bf16"]["x"], grads["exact"]["x"])
    for name in ("A", "B", "scale", "step"):
        error = (grads["bf16"][name] - grads["exact"][name]).norm() / grads["exact"][name].norm()
        assert 0 < error < 1e-2, f"{name}: {error:.1e}"
