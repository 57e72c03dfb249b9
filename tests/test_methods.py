"""Every method against its own equation, and through the life of an adapter."""

from __future__ import annotations

import warnings
from functools import cache

import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import lm_batches, perturb, tiny_model, tokens
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_dlqat import DLQATConfig, calibrate
from peft_dlqat.layer import adapter_layers
from peft_dlqat.methods import METHODS, _lsq_gradient
from peft_dlqat.quant.grid import Grid

GROUP = 32
# Each method's choices of magnitude and of zeros.
ROWS = [
    ({"method": name, "magnitude": {"group": True, "none": False, "row": "row"}[magnitude]}, zero_point)
    for name, method in METHODS.items()
    for magnitude in (method.magnitudes if name == "dlqat" else ("group",))
    for zero_point in method.zero_points
]
TRAINED = {
    "dlqat": {"A", "B", "magnitude", "shift"},
    "lrqat": {"A", "B", "magnitude"},
    "l4q": {"A", "B", "magnitude", "shift"},
    "peqa": {"magnitude"},
    "qalora": {"A", "B"},
}
ONE_LAYER = {"target_modules": ["layers.0.self_attn.q_proj"]}
each_row = pytest.mark.parametrize(
    "method, zero_point", ROWS, ids=lambda v: v if isinstance(v, str) else f"{v['method']}-{v['magnitude']}"
)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*never calibrated.*")
        yield


def config(method, zero_point, **kwargs):
    own = {"bits": 3, "group_size": GROUP, "zero_point": zero_point, "init": "minmax", "task_type": "CAUSAL_LM"}
    return DLQATConfig(**{**own, **method, **kwargs})


def adapted(method, zero_point, **kwargs):
    model = get_peft_model(tiny_model(), config(method, zero_point, **kwargs)).eval()
    perturb(model)
    return model


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


def equation(method, t, weight, grid, scaling):
    """w_hat of each paper's equation in float64; `t` has the trained tensors, s and zero."""
    rank0 = torch.zeros(0, weight.shape[1]), torch.zeros(weight.shape[0], 0)
    A, B = (x.to(weight) for x in rank0) if method in ("peqa", "qalora") else (t["A"], t["B"])
    s, zero, m = t["s"], t.get("zero"), t.get("magnitude", 1.0)
    if method in ("dlqat", "l4q"):
        B = s.abs().mean(1, keepdim=True) * B

    def times_m(zero):
        return zero if zero is None or grid.zero_point == "integer" else m * zero + s * t.get("shift", 0.0)

    if method in ("dlqat", "peqa", "lrqat"):
        return oracle.fake_quantize(
            weight, A, B, s, zero, m * s, times_m(zero), grid, scaling, in_steps=method == "lrqat"
        )
    if method == "l4q":
        if zero is not None:
            zero = (
                (zero + t["shift"]).clamp(grid.qmin, grid.qmax)
                if grid.zero_point == "integer"
                else zero + s * t["shift"]
            )
        return oracle.fake_quantize(weight, A, B, m * s, zero, m * s, zero, grid, scaling)
    assert method == "qalora"
    update = scaling * s.abs().mean(1, keepdim=True) * t["B"] @ t["A"]
    return oracle.fake_quantize(weight, A, B, s, zero, s, zero + update, grid, scaling)


@each_row
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_weight_and_gradients_are_those_of_the_equation(method, zero_point, scale_dtype):
    model = adapted(method, zero_point, scale_dtype=scale_dtype, **ONE_LAYER)
    layer = next(iter(adapter_layers(model)[1].values()))
    grid = layer.specs["default"].grid
    trained = layer.trained("default")
    double = {name: tensor.value(p.detach().double()).requires_grad_(True) for name, (tensor, p) in trained.items()}
    frozen = {"s": layer.dlqat_scale["default"].double()}
    if zero_point != "none":
        frozen["zero"] = layer.scales_and_zeros("default")[1].double()
    weight = layer.frozen.original().double()
    w_hat = equation(method["method"], {**double, **frozen}, weight, grid, layer.specs["default"].scaling)

    found = layer.quantized_weight().dequantize()
    # A code that lies on a tie may fall either way in the other precision.
    assert (found - w_hat).abs().gt(1e-5 * w_hat.abs().max()).float().mean() < 1e-3

    x, direction = torch.randn(5, 64), torch.randn(5, layer.out_features)
    (layer(x) * direction).sum().backward()
    (F.linear(x.double(), w_hat) * direction.double()).sum().backward()
    for name, (tensor, parameter) in trained.items():
        true = tensor.unit * double[name].grad
        # L4Q scales the gradients of s and zero as LSQ does.
        true = (
            true * (GROUP * grid.qmax) ** -0.5
            if method["method"] == "l4q" and name in ("magnitude", "shift")
            else true
        )
        error = (parameter.grad - true).norm() / true.norm()
        assert error < 1e-4, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.product(every=2)
@each_row
def test_training_lowers_the_loss_and_moves_only_what_the_method_trains(method, zero_point):
    model = get_peft_model(tiny_model(), config(method, zero_point))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4)
    batch, losses = lm_batches(1)[0], []
    for _ in range(10):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    expected = {f"dlqat_{name}" for name in TRAINED[method["method"]]}
    if method["magnitude"] is False:
        expected -= {"dlqat_magnitude"}
    offset_too = zero_point == "float" and method["magnitude"]
    if zero_point == "none" or (method["method"] == "dlqat" and not offset_too):
        expected -= {"dlqat_shift"}
    moved = {
        name.removesuffix(".weight").split(".")[-2]
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert moved == expected
    assert {
        name.removesuffix(".weight").split(".")[-2] for name, p in model.named_parameters() if p.requires_grad
    } == expected


@pytest.mark.product(every=3)
@each_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_reloaded_and_unmerged_equal_the_trained(method, zero_point, dtype, tmp_path):
    check_merged_reloaded_and_unmerged("llama", config(method, zero_point), dtype, tmp_path)


@pytest.mark.product(every=4)
@pytest.mark.parametrize(
    "method, bits, group_size, zero_point",
    [
        (name, bits, group_size, zero_point)
        for name, method in METHODS.items()
        for bits, group_size, zero_point in ((3, 16, "none"), (2, 16, "float"), (4, 32, "float"))
        if zero_point in method.zero_points
    ],
)
def test_merged_reloaded_and_unmerged_equal_the_trained_on_k_quants(method, bits, group_size, zero_point, tmp_path):
    own = {"bits": bits, "group_size": group_size, "scale_dtype": "k_quant"}
    check_merged_reloaded_and_unmerged(
        "wide llama", config({"method": method}, zero_point, **own), torch.float32, tmp_path
    )


def check_merged_reloaded_and_unmerged(kind, config, dtype, tmp_path):
    """A model of some kind goes through all of it."""

    def fresh_model():
        return tiny_model(kind, dtype)

    model = get_peft_model(fresh_model(), config).eval()
    fresh = logits(model)
    perturb(model)
    trained = logits(model)
    assert not torch.equal(trained, fresh)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), trained)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path / "adapter")
    for low_cpu_mem_usage in (False, True):
        base = fresh_model()
        reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(reloaded), trained)
    merged = reloaded.merge_and_unload()
    assert torch.equal(logits(merged), trained)
    merged.save_pretrained(tmp_path / "merged")
    again = fresh_model()
    again.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).state_dict())
    assert torch.equal(logits(again), trained)


def fresh_and_calibrated(method, zero_point):
    """Logits before calibration, its loss, and logits after it."""
    torch.manual_seed(0)
    own = config(method, zero_point, init="mse", layers_to_transform=[1])
    model = get_peft_model(tiny_model(), own).eval()
    fresh = logits(model)
    return fresh, calibrate(model, lm_batches(2), steps=3, progress=False).loss_after, logits(model)


@cache
def fresh_and_calibrated_dlqat(zero_point):
    return fresh_and_calibrated({"method": "dlqat"}, zero_point)


@pytest.mark.product(every=2)
@each_row
def test_a_fresh_adapter_is_round_to_nearest_and_calibrates(method, zero_point):
    """All methods start from the same grid and the same weight, and calibration moves all of them alike."""
    dlqat, dlqat_loss, dlqat_calibrated = fresh_and_calibrated_dlqat(zero_point)
    own, own_loss, own_calibrated = fresh_and_calibrated(method, zero_point)
    assert torch.equal(own, dlqat)
    # L4Q's step is m * s, so its gradient is summed in another order.
    assert own_loss == pytest.approx(dlqat_loss, rel=1e-4)
    assert torch.allclose(own_calibrated, dlqat_calibrated, atol=1e-2)


@pytest.mark.parametrize(
    "saved, config_says", [("dlqat", "lrqat"), ("lrqat", "dlqat"), ("dlqat", "l4q"), ("peqa", "qalora")]
)
def test_a_file_of_another_method_is_refused(saved, config_says, tmp_path):
    zero_point = "float" if config_says == "qalora" else "none"
    adapted({"method": saved}, zero_point).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace(f'"method": "{saved}"', f'"method": "{config_says}"'))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_two_methods_beside_each_other():
    model = adapted({"method": "peqa"}, "integer")
    first = logits(model)
    model.add_adapter("other", config({"method": "l4q"}, "float"))
    model.set_adapter("other")
    assert not torch.equal(logits(model), first)
    assert {
        name.removesuffix(".weight").split(".")[-2] for name, p in model.named_parameters() if p.requires_grad
    } == {
        "dlqat_A",
        "dlqat_B",
        "dlqat_magnitude",
        "dlqat_shift",
    }
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert not any(".other" in key for key in model.state_dict())


@each_row
def test_weight_decay_pulls_each_value_to_its_start(method, zero_point):
    """Of any optimizer: at 0, m would be another weight, not none of an update."""
    model = adapted(method, zero_point, **ONE_LAYER)
    (layer,) = adapter_layers(model)[1].values()

    def distances():
        values = {name: tensor.value(parameter.detach()) for name, (tensor, parameter) in trained.items()}
        return {name: value - (trained[name][0].start or 0.0) for name, value in values.items()}

    trained, lr, weight_decay = layer.trained("default"), 0.5, 0.5
    before = distances()
    optimizer = torch.optim.AdamW([parameter for _, parameter in trained.values()], lr=lr, weight_decay=weight_decay)
    for _, parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, after in distances().items():
        assert torch.allclose(after, (1 - lr * weight_decay) * before[name], atol=1e-6), name
    for _ in range(60):
        optimizer.step()
    assert torch.equal(logits(model), logits(get_peft_model(tiny_model(), config(method, zero_point, **ONE_LAYER))))


def test_lsq_gradient_keeps_the_value():
    grid, m = Grid(3, 16, "none", torch.float32), torch.randn(4, 2, requires_grad=True)
    scaled = _lsq_gradient(m, grid)
    assert torch.equal(scaled, m)
    scaled.sum().backward()
    assert torch.allclose(m.grad, torch.full_like(m, (16 * 3) ** -0.5))
