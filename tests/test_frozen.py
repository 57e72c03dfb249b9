"""Frozen weights kept in few bits: the same codes, the same life, and what they cannot do."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from accelerate import disk_offload
from conftest import lm_batches, perturb, say_calibrated, tiny_model, tokens, train
from op_problems import QUANTIZER, problem, quantizer_of
from peft import PeftModel, get_peft_model
from refusals import refused

from peft_dlqat import DLQATConfig, calibrate, pack_weights
from peft_dlqat import layer as layer_module
from peft_dlqat.layer import adapter_layers
from peft_dlqat.quant.dispatch import harden
from peft_dlqat.quant.fit import initialise
from peft_dlqat.quant.fixed_point import STORAGES
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.op import fake_quantize_linear
from peft_dlqat.quant.quantizer import Quantizer, decode_stored, in_steps, round_codes, store
from peft_dlqat.running import adapters_disabled

HOLDS = [(bits, name) for bits in (2, 3, 4, 8) for name, storage in STORAGES.items() if storage.bits >= bits]
ZERO_POINTS = ("none", "integer", "float")


def still(args):
    return {name: None if value is None else value.detach() for name, value in args.items()}


@pytest.mark.parametrize("bits,storage", HOLDS)
def test_codes_are_kept_and_the_rest_to_half_a_part_of_a_cell(bits, storage):
    grid, kept = Grid(bits, 64, "integer", torch.bfloat16), STORAGES[storage]
    units = torch.linspace(grid.qmin - 2, grid.qmax + 2, 2049 * 64).view(-1, 64)  # ties between codes are among them
    codes = round_codes(units, grid)
    packed = kept.encode(units, codes, grid)
    assert packed.dtype == torch.uint8 and packed.numel() * 8 == units.numel() * kept.bits
    found = kept.decode(packed, grid)
    # A tie is kept in the cell of its own code, at that cell's edge.
    assert torch.equal(round_codes(found, grid), codes)
    inside = (units >= grid.qmin - 0.5) & (units <= grid.qmax + 0.5)
    assert (found - units)[inside].abs().max() <= 0.5 * 2.0 ** (bits - kept.bits)
    assert torch.equal(kept.encode(found, codes, grid), packed)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits,storage", HOLDS)
def test_an_untrained_weight_has_the_same_codes(bits, storage, zero_point):
    grid, width = Grid(bits, 32, zero_point, torch.bfloat16), STORAGES[storage].bits
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    s, zero = initialise(weight, grid, "mse")
    full = Quantizer(grid, 1.0, torch.randn(4, 64), torch.zeros(40, 4), s, zero, s, zero)
    stored = replace(full, storage=storage)
    packed = store(weight, stored)
    assert torch.equal(harden(weight, full).codes, harden(packed, stored).codes)
    left = decode_stored(packed, stored)
    inside = (in_steps(weight, s, zero, grid) - grid.qmin).flatten(-2)
    inside = (inside > -0.5) & (inside < grid.qmax - grid.qmin + 0.5)
    bound = 0.51 * 2.0 ** (bits - width) * s.abs().repeat_interleave(32, 1)
    assert ((left - weight).abs() <= bound)[inside].all()


@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_value_and_gradients_are_those_of_the_decoded_weight(zero_point, in_steps):
    grid = Grid(3, 32, zero_point, torch.bfloat16)
    args = problem(grid)
    args["rounding_zero"] = (
        None if args["rounding_zero"] is None else args["rounding_zero"].detach().round().requires_grad_(True)
    )
    quantizer = quantizer_of(args, grid, 0.5, in_steps, "int8")
    packed = store(args["weight"], quantizer)
    y = fake_quantize_linear(args["x"], args["bias"], packed, quantizer)
    assert torch.equal(y, fake_quantize_linear(args["x"], args["bias"], args["weight"], quantizer))

    double = {k: None if v is None else v.double().requires_grad_(True) for k, v in still(args).items()}
    weight = decode_stored(packed, quantizer_of(still(args), grid, storage="int8")).double()
    w_hat = oracle.fake_quantize(weight, *(double[name] for name in QUANTIZER), grid, 0.5, in_steps)
    expected = F.linear(double["x"], w_hat, double["bias"])
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for name in ("x", "bias", "A", "B", "scale", "zero"):
        if args[name] is not None:
            true = double[name].grad
            assert (args[name].grad.double() - true).norm() < 1e-5 * true.norm(), name


def config(storage="int8", **kwargs):
    own = {"bits": 3, "group_size": 32, "init": "minmax", "storage": storage, "task_type": "CAUSAL_LM"}
    return DLQATConfig(**{**own, **kwargs})


def trained(kind="llama", storage="int8", **kwargs):
    """Calibrated, packed and trained a little."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(kind), config(storage, **kwargs))
    calibrate(model, lm_batches(2), progress=False)
    train(model, 3)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


@pytest.mark.product
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("storage,bits", [("int8", 3), ("int4", 4), ("int2", 2)])
def test_packed_trained_merged_reloaded_are_equal(kind, storage, bits, tmp_path):
    model = trained(kind, storage, bits=bits)
    layers = adapter_layers(model)[1]
    for layer in layers.values():
        packed = layer.get_base_layer().weight
        weights = layer.in_features * layer.out_features
        assert packed.dtype == torch.uint8 and packed.numel() * 8 == weights * STORAGES[storage].bits
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected) and next(iter(layers.values())).frozen.packed
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    assert not next(iter(adapter_layers(loaded)[1].values())).frozen.packed
    assert torch.equal(logits(loaded), expected)
    pack_weights(loaded)
    assert next(iter(adapter_layers(loaded)[1].values())).frozen.packed
    assert torch.equal(logits(loaded), expected)
    low = PeftModel.from_pretrained(tiny_model(kind), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(low), expected)
    injected = tiny_model(kind)
    injected.load_adapter(str(tmp_path))
    assert torch.equal(logits(injected.eval()), expected)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert all(p.is_floating_point() for p in merged.parameters())


def test_a_packed_model_follows_device_and_dtype():
    model = trained()
    layer = next(iter(adapter_layers(model)[1].values()))
    packed = layer.get_base_layer().weight.data.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.get_base_layer().weight, packed)
    assert layer.frozen.dtype == layer.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    assert layer.frozen.original().dtype == torch.bfloat16


def test_unloading_and_deleting_leave_the_decoded_weight(monkeypatch):
    model = trained()
    with pytest.warns(UserWarning, match="packed"), adapters_disabled(model):
        layer_module._warn_that_the_base_is_decoded.cache_clear()
        expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other.unload()), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), expected)


def test_the_base_is_nearly_itself_with_eight_bits():
    model = trained(bits=2)
    base = tiny_model()
    layer_module._warn_that_the_base_is_decoded.cache_clear()
    with pytest.warns(UserWarning, match="TeacherCache"), adapters_disabled(model):
        difference = (logits(model) - logits(base)).abs().max()
    assert 0 < difference < 0.5


def test_what_a_packed_weight_refuses(tmp_path):
    model = trained(init="mse")  # whose scales follow what it was calibrated on
    with pytest.raises(ValueError, match="can only share them, and this one has storage='full'"):
        model.add_adapter("other", config("full"))
    with pytest.raises(ValueError, match="calibrate anew"):
        calibrate(model, lm_batches(1), progress=False)
    torch.manual_seed(1)
    other = get_peft_model(tiny_model(), config(init="mse"))
    calibrate(other, lm_batches(1, batch=2), progress=False)
    perturb(other)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="packed by other scales"):
        model.load_adapter(str(tmp_path), "default")


def test_a_base_that_is_offloaded_is_not_packed(tmp_path):
    base = disk_offload(tiny_model(), tmp_path, execution_device=torch.device("cpu"))
    with refused(ValueError, "cannot pack", "offloaded to the CPU or disk", "load_packed", folder=tmp_path):
        get_peft_model(base, config())


@pytest.mark.parametrize("of_file,of_config", [("int4", "int8"), ("int8", "int4")])
def test_another_storage_than_it_was_trained_on_is_refused(of_file, of_config, tmp_path):
    """It would make another model of it, silently."""
    model = trained(storage=of_file)
    model.save_pretrained(tmp_path)
    other = get_peft_model(tiny_model(), config(of_config))
    with pytest.raises(ValueError, match=r"use the adapter_config\.json beside it"):
        other.load_adapter(str(tmp_path), "default")
    full = get_peft_model(tiny_model(), config("full"))
    full.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(full.eval()), logits(model))
    full.peft_config["default"].storage = of_config
    with pytest.raises(ValueError, match="was trained on a frozen weight kept as"):
        pack_weights(full)


def test_packing_under_an_adapter_that_was_trained_on_full_weights_warns():
    model = trained(storage="full")
    model.peft_config["default"].storage = "int8"
    with pytest.warns(UserWarning, match="trained on full weights"):
        pack_weights(model)


@pytest.mark.parametrize("method,settings", [("peqa", {}), ("qalora", {"zero_point": "float"})])
def test_packing_under_a_method_that_keeps_the_codes_changes_nothing(method, settings):
    """What it has trained on full weights is not in their place, so that there is nothing to warn of."""
    model = trained(storage="full", method=method, **settings)
    expected = logits(model)
    model.peft_config["default"].storage = "int4"
    pack_weights(model)  # a warning would be an error
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("into", ["packed", "full"])
def test_a_state_dict_of_weights_in_another_storage_is_refused(storage, into):
    packed, full = (get_peft_model(tiny_model(), config(storage)) for _ in range(2))
    pack_weights(packed)
    model, other = (packed, full) if into == "packed" else (full, packed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="those of the state dict are"):
        model.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(before)


def test_a_merged_model_takes_its_own_state_dict_and_no_packed_one():
    model = get_peft_model(tiny_model(), config("int8"))
    pack_weights(model)
    packed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    model.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="in full, and those of the state dict are packed"):
        model.load_state_dict(packed)


def test_all_layers_are_packed_or_none():
    model = get_peft_model(tiny_model(), config("int8"))
    model.add_adapter("other", config("full", target_modules=["v_proj"], init="mse"))
    layers = adapter_layers(model, "default")[1].values()
    with pytest.raises(ValueError, match="have scales and zeros of their own"):
        pack_weights(model, "default")
    assert not any(layer.frozen.packed for layer in layers)
    before = [layer.dlqat_scale["default"].clone() for layer in layers]
    with pytest.raises(ValueError, match="scales and zeros of their own"):  # before anything is measured
        calibrate(model, [], adapter_name="default", progress=False)
    assert all(torch.equal(s, layer.dlqat_scale["default"]) for s, layer in zip(before, layers, strict=True))


@pytest.mark.parametrize("when", ["before", "after"])
def test_two_adapters_share_a_packed_weight(when, tmp_path):
    """Their scales and zeros are the same, so one W0 in these units serves both, alone and after loading."""
    model = get_peft_model(tiny_model(), config("int8"))
    expected = logits(model.eval())
    if when == "before":
        model.add_adapter("other", config("int8"))
    pack_weights(model, "default")
    if when == "after":
        model.add_adapter("other", config("int8"))
    model.set_adapter("other")
    assert torch.equal(logits(model), expected)
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "other").eval()
    assert torch.equal(logits(reloaded), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="calibrate anew"):
        calibrate(model, lm_batches(1), progress=False)


def test_calibration_does_not_take_other_adapters_along():
    model = get_peft_model(tiny_model(), config("int8"))
    model.add_adapter("other", config("int8"))
    with pytest.raises(ValueError, match=r"there are adapters with others: \['other'\]"):
        calibrate(model, lm_batches(1), adapter_name="default", progress=False)


@pytest.mark.slow
def test_a_compiled_packed_model_can_switch_its_adapter_off():
    torch._dynamo.reset()
    model = trained()
    with model.disable_adapter(), pytest.warns(UserWarning, match="packed"):
        layer_module._warn_that_the_base_is_decoded.cache_clear()
        expected = logits(model)
    with model.disable_adapter():
        found = torch.compile(model, backend="eager", fullgraph=True)(tokens()).logits
    assert torch.equal(found, expected)


def test_an_adapter_that_was_never_packed_belongs_to_the_full_weight(tmp_path):
    model = get_peft_model(tiny_model(), config())
    perturb(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)


PACKED = [
    {"storage": "full", "gradient": "lowrank", "magnitude": "row"},
    {"storage": "int8", "gradient": "exact"},
    {"storage": "int4", "gradient": "lowrank", "magnitude": "row"},
    {"storage": "int4", "gradient": "bf16", "zero_point": "float"},
]


def packed(**changes):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config(**changes))
    pack_weights(model)
    perturb(model)
    say_calibrated(model)
    return model.train()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.product
@pytest.mark.parametrize("changes", PACKED)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(changes, use_reentrant):
    model, other = packed(**changes), packed(**changes)
    other.enable_input_require_grads()
    other.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for each in (model, other):
        each(**lm_batches(1)[0]).loss.backward()
    expected, found = gradients(model), gradients(other)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("changes", PACKED)
def test_torch_compile_gives_the_same_gradients_without_graph_breaks(changes):
    torch._dynamo.reset()
    model, other = packed(**changes), packed(**changes)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    outputs = [run(input_ids=tokens()).logits for run in (model, compiled)]
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    expected, found = gradients(model), gradients(other)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm(), name


def test_what_was_merged_frees_the_original_weight_at_once():
    """Nothing holds it in a cycle, which only the garbage collector would break."""
    model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, task_type="CAUSAL_LM"))
    layer = next(iter(adapter_layers(model)[1].values()))
    original = weakref.ref(layer.get_base_layer().weight.data.untyped_storage())
    del layer
    gc.disable()
    try:
        merged = model.merge_and_unload()
        del model
        assert original() is None and merged is not None
    finally:
        gc.enable()


def test_packing_that_fails_changes_nothing(monkeypatch):
    model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, storage="int4", task_type="CAUSAL_LM"))
    perturb(model)
    expected = logits(model)
    layer = next(iter(adapter_layers(model)[1].values()))

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("peft_dlqat.frozen.store", fail)
    with pytest.raises(MemoryError):
        layer.frozen.pack("default", "int4")
    assert layer.specs["default"].storage == "full" and torch.equal(logits(model), expected)


@pytest.mark.parametrize("storage", ["full", "int8"])
def test_a_weight_that_was_replaced_comes_back(storage):
    """The very Parameter, also twice replaced, and after the model has moved to another dtype."""
    model = get_peft_model(tiny_model(), config(storage=storage))
    pack_weights(model)
    frozen = next(iter(adapter_layers(model)[1].values())).frozen
    parameter, before = frozen._parameter, frozen._parameter.data.clone()
    frozen.restore()  # nothing was replaced
    assert frozen._parameter is parameter
    for value in (1.0, 2.0):
        frozen.replace(torch.full(frozen.original().shape, value))
        assert frozen._parameter is not parameter and (frozen._parameter == value).all()
        assert torch.equal(frozen.as_kept(), before)
    with frozen.in_its_place():
        assert frozen._parameter is parameter
    assert (frozen._parameter == 2.0).all()
    frozen.restore()
    assert frozen._parameter is parameter and torch.equal(parameter, before)
    frozen.restore()
    assert frozen._parameter is parameter
