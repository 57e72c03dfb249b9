"""The fused op against a float64 autograd account of the formula, in value, gradients and memory."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

from peft_dlqat import Grid
from peft_dlqat.initialisation import initialise
from peft_dlqat.ops import fake_quantize_linear

NAMES = ("x", "bias", "A", "B", "magnitude", "scale", "zero")
ZERO_POINTS = ("none", "integer", "float")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def problem(grid, out=24, n_in=64, r=4, tokens=(2, 5), dtype=torch.float32, seed=0):
    """Arguments of the op, with a grid that clips some weights and has real-valued zeros, as while calibrating."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, n_in, generator=g)
    scale, zero = initialise(weight, grid, "mse")
    args = {
        "x": torch.randn(*tokens, n_in, generator=g, dtype=dtype),
        "bias": torch.randn(out, generator=g, dtype=dtype),
        "weight": weight,
        "A": 0.3 * torch.randn(r, n_in, generator=g),
        "B": 0.3 * torch.randn(out, r, generator=g),
        "magnitude": 1 + 0.2 * torch.randn(scale.shape, generator=g),
        "scale": scale * (1 + 0.1 * torch.rand(scale.shape, generator=g)),
        "zero": None if zero is None else zero + 0.1 * torch.randn(zero.shape, generator=g),
    }
    for name in NAMES:
        if args[name] is not None:
            args[name].requires_grad_(True)
    return args


def reference(args, grid, scaling):
    """Output and gradients in float64."""
    double = {k: None if v is None else v.detach().double().requires_grad_(True) for k, v in args.items()}
    w_hat = oracle.fake_quantize(
        double["weight"], double["A"], double["B"], double["magnitude"], double["scale"], double["zero"], grid, scaling
    )
    y = F.linear(double["x"], w_hat, double["bias"])
    return y, double


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_value_and_every_gradient(zero_point, bits, group_size, scale_dtype):
    grid = Grid(bits, group_size, zero_point, scale_dtype)
    args = problem(grid)
    y = fake_quantize_linear(**args, grid=grid, scaling=2.0)
    expected, double = reference(args, grid, 2.0)
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


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_some_weights_are_clipped(zero_point):
    """The gradient tests would prove nothing about the clip's mask if no weight were clipped."""
    grid = Grid(3, 32, zero_point, torch.bfloat16)
    args = problem(grid)
    y = fake_quantize_linear(**args, grid=grid, scaling=2.0)
    y.square().sum().backward()
    masked = args["B"].grad.clone()
    latent = args["weight"] + 2.0 * args["B"] @ args["A"]
    w = grid.group(latent)
    z = None if args["zero"] is None else args["zero"].unsqueeze(-1)
    s = args["scale"].unsqueeze(-1)
    t = (w - z) / s if zero_point == "float" else w / s + (z.round() if zero_point == "integer" else 0)
    share = ((t < grid.qmin) | (t > grid.qmax)).float().mean()
    assert 0.01 < share < 0.5
    assert masked.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_runs_in_its_own_dtype(dtype):
    """y is exactly F.linear of the float32 weight rounded once to the input's dtype."""
    grid = Grid(4, 32, "integer", torch.bfloat16)
    args = problem(grid, dtype=dtype)
    y = fake_quantize_linear(**args, grid=grid, scaling=1.0)
    assert y.dtype == dtype
    w_hat = oracle.fake_quantize(
        *(args[k].detach() for k in ("weight", "A", "B", "magnitude", "scale", "zero")), grid, 1.0
    )
    assert torch.equal(y, F.linear(args["x"], w_hat.to(dtype), args["bias"]))
    y.float().sum().backward()
    assert args["x"].grad.dtype == dtype and args["A"].grad.dtype == torch.float32


def test_only_the_asked_gradients_are_computed():
    grid = Grid(4, 32, "integer", torch.bfloat16)
    args = problem(grid)
    for name in ("x", "bias", "scale", "zero", "magnitude"):
        args[name].requires_grad_(False)
    fake_quantize_linear(**args, grid=grid, scaling=1.0).sum().backward()
    assert args["A"].grad is not None and args["B"].grad is not None
    assert all(args[name].grad is None for name in ("x", "bias", "scale", "zero", "magnitude"))


@pytest.mark.parametrize("tokens", [(3,), (0,), (2, 3, 4), ()])
def test_any_leading_shape(tokens):
    grid = Grid(4, 32, "float", torch.float32)
    args = problem(grid, tokens=tokens)
    y = fake_quantize_linear(**args, grid=grid, scaling=1.0)
    assert y.shape == (*tokens, 24)
    y.sum().backward()
    assert args["x"].grad.shape == args["x"].shape


def test_transposed_weight_gives_the_same_result():
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    y = fake_quantize_linear(**args, grid=grid, scaling=1.0)
    y.sum().backward()
    grads = {name: args[name].grad.clone() for name in NAMES}
    other = problem(grid)
    other["weight"] = other["weight"].t().contiguous()
    z = fake_quantize_linear(**other, grid=grid, scaling=1.0, fan_in_fan_out=True)
    z.sum().backward()
    assert torch.allclose(y, z, rtol=1e-5, atol=1e-5)
    for name in NAMES:
        assert torch.allclose(grads[name], other[name].grad, rtol=1e-4, atol=1e-4), name


def test_nothing_of_the_weights_size_is_kept_for_backward():
    grid = Grid(3, 128, "integer", torch.bfloat16)
    args = problem(grid, out=1024, n_in=1024, r=16, tokens=(256,))
    own = {args[name].data_ptr() for name in ("weight", "bias", "A", "B", "magnitude")}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fake_quantize_linear(**args, grid=grid, scaling=1.0)
    input_bytes = args["x"].numel() * args["x"].element_size()
    assert input_bytes <= sum(saved) <= 1.1 * input_bytes
    y.sum().backward()


def test_the_op_passes_torchs_own_checks():
    """Schema, fake tensors and autograd registration, which torch.compile relies on."""
    grid = Grid(3, 32, "integer", torch.bfloat16)
    args = problem(grid)
    from peft_dlqat.ops import _fake_quantize_linear

    torch.library.opcheck(
        _fake_quantize_linear,
        (
            *(args[k] for k in ("x", "bias", "weight", "A", "B", "magnitude", "scale", "zero")),
            2.0,
            grid.bits,
            grid.group_size,
            grid.zero_point,
            grid.scale_dtype,
            False,
        ),
    )
