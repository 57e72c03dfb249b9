"""An adapter on a base model of which a device_map keeps parts on the CPU or disk is the adapter on the whole one."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import lm_batches, perturb, tiny_model, train
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from peft_dlqat import DLQATConfig, calibrate
from peft_dlqat.layer import adapter_layers
from peft_dlqat.running import adapters_disabled

MAP = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
       "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip


def some_on_disk(model, folder):
    return dispatch_model(model, MAP, offload_dir=folder)


def all_on_disk(model, folder):
    return disk_offload(model, folder, execution_device=torch.device("cpu"))


def all_on_cpu(model, folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def adapted(base, **changes):
    torch.manual_seed(0)
    return get_peft_model(base, DLQATConfig(bits=3, group_size=32, task_type="CAUSAL_LM", **changes))


@torch.no_grad()
def logits(model):
    return model.eval()(**lm_batches(1)[0]).logits


def assert_same(model, expected):
    assert torch.equal(logits(model), logits(expected))
    state, other = get_peft_model_state_dict(model), get_peft_model_state_dict(expected)
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.product
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("offload", [some_on_disk, all_on_disk, all_on_cpu])
def test_calibrated_trained_and_saved(offload, kind, tmp_path):
    if kind == "gpt2" and offload is some_on_disk:
        pytest.skip("the map is a LLaMA's")
    model, expected = adapted(offload(tiny_model(kind), tmp_path / "offload")), adapted(tiny_model(kind))
    layer = next(iter(adapter_layers(model)[1].values()))
    assert layer.get_base_layer().weight.is_meta and not layer.dlqat_A["default"].is_meta
    assert_same(model, expected)
    for each in (model, expected):
        calibrate(each, lm_batches(), steps=2, progress=False)
        torch.manual_seed(0)  # of dropout
        train(each)
    assert_same(model, expected)
    with adapters_disabled(model), adapters_disabled(expected):
        assert torch.equal(logits(model), logits(expected))
    assert layer.get_base_layer().weight.is_meta
    other = next(iter(adapter_layers(expected)[1].values()))
    assert torch.equal(layer.quantized_weight().codes, other.quantized_weight().codes)
    model.save_pretrained(tmp_path / "adapter")
    assert_same(PeftModel.from_pretrained(tiny_model(kind), tmp_path / "adapter"), expected)


def test_calibrated_by_blocks(tmp_path):
    model, expected = adapted(some_on_disk(tiny_model(), tmp_path)), adapted(tiny_model())
    for each in (model, expected):
        calibrate(each, lm_batches(), steps=2, by="blocks", objective="output", progress=False)
    assert_same(model, expected)


@pytest.mark.parametrize("offload", [some_on_disk, all_on_cpu])
def test_a_saved_adapter_is_loaded(offload, tmp_path):
    saved = adapted(tiny_model())
    perturb(saved)
    saved.save_pretrained(tmp_path / "adapter")
    # PEFT dispatches the model anew with the adapter in it, whose tensors then are offloaded too.
    model = PeftModel.from_pretrained(offload(tiny_model(), tmp_path / "offload"), tmp_path / "adapter",
                                      offload_folder=tmp_path / "again")  # fmt: skip
    assert torch.equal(logits(model), logits(saved))


def test_merged(tmp_path):
    model, expected = adapted(all_on_cpu(tiny_model(), tmp_path)), adapted(tiny_model())
    perturb(model)
    perturb(expected)
    before = logits(model)
    model.merge_adapter()
    expected.merge_adapter()
    assert torch.equal(logits(model), logits(expected))
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_packing_is_refused(tmp_path):
    base = some_on_disk(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="offloaded to the CPU or disk"):
        adapted(base, storage="int8")
    assert not any("dlqat" in name for name, _ in base.named_parameters())
