"""Nothing is lost on the way: trained, reloaded, merged, saved and unmerged models give the very same logits."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from conftest import lm_batches, perturb, tiny_model, tokens
from foreign_layers import Net
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_dlqat import DLQATConfig, OtherBaseWarning, calibrate, pack_weights
from peft_dlqat.layer import _warn_that_the_base_is_decoded, adapter_layers
from peft_dlqat.quant.super_blocks import K_QUANTS

KINDS = ("llama", "gpt2", "opt")
ZERO_POINTS = ("none", "integer", "float")
SCALE_DTYPES = ("bfloat16", "float16", "float32")


def adapted(kind="llama", dtype=torch.float32, **config):
    """A model with an adapter whose A, B and m have moved, as after training."""
    config = {"bits": 3, "group_size": 32, "init": "minmax", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(tiny_model(kind, dtype), DLQATConfig(**config))
    perturb(model)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_merged_reloaded_and_unmerged_equal_the_trained(kind, bits, group_size, zero_point, scale_dtype, tmp_path):
    config = {"bits": bits, "group_size": group_size, "zero_point": zero_point, "scale_dtype": scale_dtype}
    check_merged_reloaded_and_unmerged(kind, config, tmp_path)


@pytest.mark.product
@pytest.mark.parametrize("kind", ["wide llama", "wide gpt2"])
@pytest.mark.parametrize("quant", K_QUANTS.values(), ids=lambda quant: quant.name)
def test_merged_reloaded_and_unmerged_equal_the_trained_on_k_quants(kind, quant, tmp_path):
    config = {"bits": quant.bits, "group_size": quant.group_size, "zero_point": quant.zero_point}
    check_merged_reloaded_and_unmerged(kind, {**config, "scale_dtype": "k_quant"}, tmp_path)


def check_merged_reloaded_and_unmerged(kind, config, tmp_path):
    """A model of some kind goes through all of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="group_size does not divide")  # 128 on inputs of 64
        model = adapted(kind, **config)
        trained = logits(model)
        assert not torch.equal(trained, logits(tiny_model(kind)))

        before = {
            name: layer.get_base_layer().weight.detach().clone() for name, layer in adapter_layers(model)[1].items()
        }
        model.merge_adapter(safe_merge=True)
        assert torch.equal(logits(model), trained)
        model.unmerge_adapter()
        for name, layer in adapter_layers(model)[1].items():
            assert torch.equal(layer.get_base_layer().weight, before[name])
        assert torch.equal(logits(model), trained)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_model(kind)))

        model.save_pretrained(tmp_path / "adapter")
        reloaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), trained)
    merged = reloaded.merge_and_unload()
    assert torch.equal(logits(merged), trained)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained)


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_low_precision_base(kind, dtype, zero_point, autocast_adapter_dtype, tmp_path):
    """The quantizer's state is float32 in memory and on disk, whatever the base."""
    config = DLQATConfig(bits=3, group_size=32, zero_point=zero_point, init="minmax", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(kind, dtype), config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    perturb(model)
    _, layers = adapter_layers(model)
    for layer in layers.values():
        state = [layer.dlqat_magnitude, layer.dlqat_scale, layer.dlqat_zero_point, layer.dlqat_offset]
        assert all(entries[name].dtype == torch.float32 for entries in state for name in entries)
        assert layer.dlqat_A["default"].dtype == torch.float32
    trained = logits(model)
    assert trained.dtype == dtype
    model.merge_adapter()
    assert torch.equal(logits(model), trained)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        reloaded = PeftModel.from_pretrained(
            tiny_model(kind, dtype),
            tmp_path,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        assert torch.equal(logits(reloaded), trained)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_casting_the_model_leaves_the_quantizer_in_float32(cast):
    model = adapted(zero_point="integer")
    _, layers = adapter_layers(model)
    layer = next(iter(layers.values()))
    before = {
        name: getattr(layer, name)["default"].clone()
        for name in ("dlqat_A", "dlqat_B", "dlqat_scale", "dlqat_zero_point", "dlqat_magnitude")
    }
    with pytest.warns(OtherBaseWarning):
        cast(model)
    assert layer.get_base_layer().weight.dtype != torch.float32
    for name, tensor in before.items():
        assert getattr(layer, name)["default"].dtype == torch.float32
        assert torch.equal(getattr(layer, name)["default"], tensor)


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_every_way_of_loading_gives_the_same(dtype, zero_point, tmp_path):
    base = tmp_path / "base"
    tiny_model(dtype=dtype).save_pretrained(base)

    def load_base():
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)

    config = DLQATConfig(bits=3, group_size=32, zero_point=zero_point, init="minmax", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(), config).eval()
    perturb(model)
    trained = logits(model)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)

    assert torch.equal(logits(PeftModel.from_pretrained(load_base(), adapter)), trained)
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(), adapter, low_cpu_mem_usage=True)), trained)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype)), trained)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter, dtype=dtype)), trained)
    injected = load_base()
    injected.load_adapter(str(adapter))
    assert torch.equal(logits(injected), trained)
    second = get_peft_model(load_base(), DLQATConfig(bits=3, group_size=32, init="minmax", task_type="CAUSAL_LM"))
    second.load_adapter(adapter, "other")
    second.set_adapter("other")
    assert torch.equal(logits(second), trained)


def test_transformers_own_add_adapter_saves_and_loads(tmp_path):
    model = tiny_model()
    model.add_adapter(DLQATConfig(bits=3, group_size=32))
    perturb(model)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    again = tiny_model()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), trained)
    again.disable_adapters()
    assert torch.equal(logits(again), logits(tiny_model()))
    wrapped = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(wrapped), trained)


def test_saved_files_hold_just_the_adapter(tmp_path):
    from safetensors.torch import load_file

    model = adapted(zero_point="integer")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {"dlqat_A", "dlqat_B", "dlqat_magnitude", "dlqat_scale", "dlqat_zero_point", "dlqat_spec", "dlqat_record"}
    layers = 2 * 7
    assert {key.removesuffix(".weight").rpartition(".")[2] for key in tensors} == kinds
    assert len(tensors) == layers * len(kinds)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_merges_to_the_same_logits(kind):
    model = adapted(kind)
    with torch.autocast("cpu", torch.bfloat16):
        trained = logits(model)
        model.merge_adapter()
        assert torch.equal(logits(model), trained)


def test_merged_equals_trained_when_worked_through_in_pieces(monkeypatch):
    monkeypatch.setattr("peft_dlqat.quant.quantizer._PIECE", 5 * 64)
    model = adapted()
    trained = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), trained)


def test_a_fresh_adapter_is_round_to_nearest():
    """Before training, each weight is the nearest value that its grid holds."""
    model = get_peft_model(tiny_model(), DLQATConfig(bits=4, group_size=32, zero_point="none"))
    _, layers = adapter_layers(model)
    for layer in layers.values():
        quantized = layer.quantized_weight()
        error = (quantized.dequantize() - layer.frozen.original()).abs()
        grid = quantized.grid
        inside = (quantized.codes > grid.qmin) & (quantized.codes < grid.qmax)
        step = quantized.scale.abs().repeat_interleave(grid.group_size, 1)
        assert (error <= 0.5 * step + 1e-6)[inside].all()


@pytest.mark.product
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_zero_rows_stay_zero(zero_point, scale_dtype):
    """A row, group or weight of zeros is exactly zero until it is trained, and all but zero then; nothing is NaN."""
    for bits, init, dtype in itertools.product((2, 3, 4, 8), ("mse", "minmax"), (torch.float32, torch.bfloat16)):
        if dtype == torch.bfloat16 and bits != 3:
            continue
        torch.manual_seed(0)
        base = Net()
        base.first.weight.data[3] = 0  # a row
        base.first.weight.data[5, 16:] = 0  # a group
        base.second.weight.data[:] = 0  # everything
        base = base.to(dtype)
        zero = {name: base.get_submodule(name).weight == 0 for name in ("first", "second")}
        config = DLQATConfig(
            bits=bits,
            init=init,
            group_size=16,
            zero_point=zero_point,
            scale_dtype=scale_dtype,
            target_modules=["first", "second"],
        )
        model = get_peft_model(base, config)
        layers = {name: model.base_model.model.get_submodule(name) for name in zero}

        def check(stage, layers=layers, zero=zero, setting=(bits, init, dtype)):
            for name, layer in layers.items():
                weight = layer.quantized_weight().dequantize()
                assert weight.isfinite().all(), (stage, name, setting)
                largest = 2 ** setting[0] * 2.0**-14 if stage == "trained" else 0.0  # of the step of zeros
                assert weight[zero[name]].abs().max() <= largest, (stage, name, setting)

        check("initialised")
        batches = [{"input_ids": batch["input_ids"], "labels": batch["labels"]} for batch in lm_batches(2, 2, 8)]
        result = calibrate(model, batches, steps=3, lr=0.05, objective="task", progress=False)
        assert result.loss_after == result.loss_after
        check("calibrated")
        # A zero has no gradient of its own.
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        for batch in batches * 2:
            optimizer.zero_grad()
            loss = model(**batch).loss
            assert loss.isfinite()
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert gradients
            assert all(gradient.isfinite().all() for gradient in gradients)
            optimizer.step()
        check("trained")
        model.eval()
        trained = logits(model)
        merged = model.merge_and_unload(safe_merge=True)
        assert torch.equal(logits(merged), trained)
        for name, entries in zero.items():
            assert merged.get_submodule(name).weight[entries].abs().max() <= 2**bits * 2.0**-14


@pytest.mark.filterwarnings("ignore:.*never calibrated")
def test_a_packed_layer_reads_what_is_kept_and_says_what_it_is_without_its_adapter():
    model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, storage="int8", task_type="CAUSAL_LM"))
    layers = adapter_layers(model)[1].values()
    assert {layer.quantizer("default").storage for layer in layers} == {"full"}
    pack_weights(model)
    assert {layer.quantizer("default").storage for layer in layers} == {"int8"}
    _warn_that_the_base_is_decoded.cache_clear()
    with model.disable_adapter(), pytest.warns(UserWarning, match="the frozen weights are packed") as caught:
        logits(model)
    assert len(caught) == 1


def test_a_merged_models_state_dict_is_no_unmerged_ones():
    model, other = adapted(), adapted()
    perturb(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"state dict are not those .*taken while merged.*unmerge_adapter"):
        other.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict())  # merged it is right


def test_a_layer_trains_by_itself():
    layer = next(iter(adapter_layers(adapted())[1].values()))
    assert not layer.training and layer.train() is layer and layer.training
    assert layer.train(False) is layer and not layer.training


def test_a_state_dict_of_another_adapter_is_refused():
    """Of one in another width of codes, and of one whose frozen parameters were left out."""
    model, other = adapted(bits=4), adapted(bits=3)
    before = logits(other)
    with pytest.raises(ValueError, match=r"dlqat_spec of the state dict .*bits: 4 in the file, 3 here"):
        other.load_state_dict(model.state_dict())
    frozen = {name for name, parameter in other.named_parameters() if not parameter.requires_grad}
    trained = {name: value for name, value in other.state_dict().items() if name not in frozen}
    with pytest.raises(ValueError, match=r"but not the scales that it goes with.*DeepSpeed.*load_adapter"):
        other.load_state_dict(trained, strict=False)
    base = {name: value for name, value in model.state_dict().items() if ".dlqat_" not in name}
    other.load_state_dict(base, strict=False)  # nothing of an adapter
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_is_the_base_of_its_adapter(dtype, tmp_path):
    """Whether before or after the calibration; no warning of another base."""
    for index, cast_first in enumerate((True, False)):
        model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, init="minmax", task_type="CAUSAL_LM"))
        model = model.to(dtype) if cast_first else model
        calibrate(model, lm_batches(1), steps=0, progress=False)
        if cast_first:
            model.save_pretrained(tmp_path / str(index))
            loaded = PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path / str(index))
            assert torch.equal(logits(loaded), logits(model))
            model.load_state_dict(model.state_dict())
            continue
        with pytest.warns(OtherBaseWarning, match="become"):
            model.to(dtype)  # its codes were of the other W0
        with pytest.warns(OtherBaseWarning, match="state dict"):
            model.load_state_dict(model.state_dict())


def test_replicas_of_data_parallel_find_their_tensors():
    """torch puts a replica's tensors beside it as attributes, not among its parameters."""
    entries = next(iter(adapter_layers(adapted())[1].values())).dlqat_A
    replica = entries._replicate_for_data_parallel()
    entry = replica._modules["default"]._replicate_for_data_parallel()
    entry.weight = torch.ones(2)
    replica._modules["default"] = entry
    assert torch.equal(replica["default"], torch.ones(2)) and replica.get("default") is not None
    assert replica.get("other") is None
    with pytest.raises(KeyError):
        replica["other"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tracing():
    config = DLQATConfig(bits=3, group_size=16, target_modules=["0"])
    model, x = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 8)), config).eval(), torch.randn(2, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        assert torch.equal(traced(x), model(x))
