"""A checkpoint loaded straight into packed weights is the model that the ordinary way gives, in less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lm_batches, tiny_model, train
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_dlqat import DLQATConfig, calibrate, calibrate_from_disk, load_packed, pack_weights
from peft_dlqat.layer import adapter_layers

SCRIPT = Path(__file__).parents[1] / "scripts" / "loading_memory.py"


def config(storage="int8", **kwargs):
    return DLQATConfig(**{"bits": 3, "group_size": 32, "task_type": "CAUSAL_LM", "storage": storage, **kwargs})


def in_full(folder, dtype=None):
    return AutoModelForCausalLM.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))


def assert_same(one, other):
    """All tensors, their kinds, what trains, and what the config says."""
    for tensors in (lambda model: model.named_parameters(remove_duplicate=False), lambda model: model.named_buffers()):
        first, second = dict(tensors(one)), dict(tensors(other))
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
            assert tensor.requires_grad == second[name].requires_grad, name
    assert len(list(one.parameters())) == len(list(other.parameters()))  # the same are tied
    assert one.training == other.training
    assert one.peft_config == other.peft_config
    assert one.generation_config == other.generation_config
    batch = lm_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(one(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "storage,changes",
    [
        ("int8", {"zero_point": "none"}),
        ("int4", {"zero_point": "float", "init": "minmax", "init_weights": False}),
        ("int2", {"bits": 2, "bias": "all"}),
    ],
)
def test_new_adapter(kind, storage, changes, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path, max_shard_size="60KB")
    torch.manual_seed(0)
    expected = get_peft_model(in_full(tmp_path), config(storage, **changes))
    pack_weights(expected)
    torch.manual_seed(0)
    given = config(storage, **changes)
    model = load_packed(tmp_path, given)
    assert_same(model, expected)
    assert all(layer.frozen.packed for layer in adapter_layers(model)[1].values())


@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "up_proj"]}])
def test_new_adapter_in_another_dtype(changes, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = get_peft_model(in_full(tmp_path, torch.bfloat16), config(**changes))
    pack_weights(expected)
    torch.manual_seed(0)
    assert_same(load_packed(str(tmp_path), config(**changes), dtype=torch.bfloat16), expected)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("kind,changes", [("llama", {"modules_to_save": ["lm_head"]}), ("opt", {"bias": "all"})])
def test_saved_adapter(kind, changes, is_trainable, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path / "base")
    model = get_peft_model(in_full(tmp_path / "base"), config(**changes))
    pack_weights(model)
    with pytest.warns(UserWarning, match="never calibrated"):
        train(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = PeftModel.from_pretrained(in_full(tmp_path / "base"), tmp_path / "adapter", is_trainable=is_trainable)
    pack_weights(expected)
    assert_same(load_packed(tmp_path / "base", tmp_path / "adapter", is_trainable=is_trainable), expected)


def test_adapter_calibrated_from_disk(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    calibrate_from_disk(tmp_path / "base", config(), lm_batches(), tmp_path / "adapter", steps=2, progress=False)
    model = load_packed(tmp_path / "base", tmp_path / "adapter", is_trainable=True)
    torch.manual_seed(0)
    expected = get_peft_model(in_full(tmp_path / "base"), config())
    calibrate(expected, lm_batches(), steps=2, by="blocks", objective="output", progress=False)
    pack_weights(expected)
    loaded, made = model.peft_config["default"], expected.peft_config["default"]
    assert loaded.storage == made.storage == "int8"
    expected.peft_config = model.peft_config  # a loaded config says that it was loaded
    assert_same(model, expected)
    train(model)


def saved_adapter(folder, base):
    model = get_peft_model(base, config())
    pack_weights(model)
    model.save_pretrained(folder)


def test_another_base_model_than_the_adapters_is_said(tmp_path):
    saved_adapter(tmp_path / "adapter", tiny_model())
    other = tiny_model()
    other.model.layers[1].mlp.up_proj.weight.data *= 1.01
    other.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="are not those that the adapter was trained on"):
        load_packed(tmp_path / "other", tmp_path / "adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("new", [True, False])
def test_a_base_that_is_not_finite_is_refused(value, new, tmp_path):
    saved_adapter(tmp_path / "adapter", tiny_model())
    broken = tiny_model()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj holds NaN or infinity"):
        load_packed(tmp_path / "broken", config() if new else tmp_path / "adapter")


def test_tied_embeddings_stay_tied(tmp_path):
    tiny_model("opt").save_pretrained(tmp_path)
    model = load_packed(tmp_path, config()).get_base_model()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_a_tied_weight_is_not_packed():
    with pytest.warns(UserWarning, match="tied layer"), pytest.raises(ValueError, match="same tensor"):
        get_peft_model(tiny_model("opt"), config(target_modules=["lm_head"]))


def test_what_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="storage='full' packs nothing"):
        load_packed(tmp_path / "base", config("full"))
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(TypeError, match="LORA adapter"):
        load_packed(tmp_path / "base", tmp_path / "lora")
    with pytest.raises(ValueError, match="only causal language models"):
        load_packed(tmp_path / "base", config(task_type="SEQ_CLS"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_packed(tmp_path / "nowhere", config())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_base_is_named(sharded, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "1GB")
    index = tmp_path / "model.safetensors.index.json"
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or cut short"):
        load_packed(tmp_path, config())
    if sharded:
        index.write_text(index.read_text()[:100])
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            load_packed(tmp_path, config())


@pytest.mark.parametrize("shard", [3, None, [], "../model.safetensors", "/model.safetensors", "", "x" * 300])
def test_a_shard_that_is_no_file_beside_its_index_is_refused(shard, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(ValueError, match=r"index\.json is damaged.*copy or download it again"):
        load_packed(tmp_path / "base", config())
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match=r"index\.json is damaged: no file"):
        load_packed(tmp_path / "base", config())


@pytest.mark.slow
def test_the_full_model_is_never_in_memory(tmp_path):
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    output = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    full, result, peak = (int(number) for number in output.split())
    print(f"full {full / 1e6:.0f} MB, packed {result / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    # Beside what stays: one layer in full, the pieces that it is fitted and packed by, and what libraries allocate.
    assert peak < result + 0.2 * full < 0.6 * full
