"""What an export is held to: the model as it trained, run unmerged, which the merged weights alone must give again."""

from __future__ import annotations

import copy

import pytest
import torch
import trl_trainers
from conftest import perturb
from export_models import adapted, base_model, merged_logits, save_base
from peft import get_peft_model
from transformers import LlamaConfig

from peft_dlqat import DLQATConfig, export_model, pack_weights
from peft_dlqat.export.manifest import load_manifest, load_reference
from peft_dlqat.export.reference import prompt_ids, trained_logits, written_logits
from peft_dlqat.export.source import Source, open_source
from peft_dlqat.layer import adapter_layers

IDS = torch.arange(20)[None]


def trained(model, name="default"):
    notes = []
    found = trained_logits(Source(model, name), IDS, notes)
    assert not notes
    return found


@pytest.mark.parametrize("kind", ["llama", "tied", "gemma3", "gpt2", "phi"])
@pytest.mark.parametrize(
    "settings", [{"bits": 3}, {"bits": 4, "zero_point": "float", "modules_to_save": ["norm"]}], ids=str
)
def test_it_is_the_models_own_output_to_the_bit(kind, settings):
    if "modules_to_save" in settings and kind in ("gpt2", "phi"):
        settings = {**settings, "modules_to_save": None}
    model = adapted(kind, **settings)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(trained(model), expected)
    assert torch.equal(written_logits(Source(model, "default"), IDS), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merged_disabled_training_or_not_the_active_one():
    """What the model happens to be set to has no part in it, and stays so."""
    model = adapted(bits=3)
    expected = merged_logits(model, IDS)
    model.merge_adapter()
    assert torch.equal(trained(model), expected) and adapter_layers(model)[1].popitem()[1].merged
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(trained(model), expected)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    assert torch.equal(trained(model.train()), expected) and model.active_adapters == ["other"] and model.training


def test_an_adapter_that_transformers_has_loaded_itself_and_nobody_has_run(tmp_path):
    model = adapted(bits=3)
    model.save_pretrained(tmp_path)
    loaded = base_model("llama")
    loaded.load_adapter(tmp_path)
    assert torch.equal(trained(loaded), merged_logits(model, IDS))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_forward_that_a_trainer_put_in_the_models_place(kind, tmp_path):
    """TRL's runs the very model that it was made for, also when it is called on a copy."""
    run = trl_trainers.trainer(
        kind, trl_trainers.adapted(kind, trained=True), tmp_path, max_steps=1, learning_rate=1e-4
    )
    run.train()
    assert "forward" in vars(run.model.get_base_model())
    with torch.no_grad():
        model = run.model.get_base_model().eval()
        expected = type(model).forward(model, input_ids=IDS, use_cache=False).logits
    assert torch.equal(trained(run.model), expected)


def test_packed_weights():
    model = adapted(bits=3, storage="int8", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="trained on full weights"):
        pack_weights(model)
    found = trained_logits(Source(model, "default"), IDS, [])
    assert torch.equal(found, written_logits(Source(model, "default"), IDS)) and found.isfinite().all()


def test_an_adapter_on_disk(tmp_path):
    base = save_base("tied", tmp_path / "base")
    model = adapted("tied", bits=3, modules_to_save=["norm"])
    model.save_pretrained(tmp_path / "adapter")
    source = open_source(tmp_path / "adapter", base, None)
    assert torch.equal(trained_logits(source, IDS, []), merged_logits(model, IDS))
    assert all(layer.frozen.as_kept().is_meta for layer in source.layers.values())


def doubled(module, args, output):
    return 2 * output


def test_a_layer_that_is_more_than_its_weight_is_refused(tmp_path):
    """Here by a hook on the adapted layer, which is not in the file."""
    model = adapted(bits=4)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(doubled)
    with pytest.raises(RuntimeError, match=r"with its adapter merged is not the model that trained \(max difference"):
        export_model(model, tmp_path / "out", "dense", verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*never calibrated")
def test_frequencies_that_the_model_has_rounded_are_told(tmp_path):
    """model.to(bfloat16) rounds RoPE's, from_pretrained(dtype=...) does not."""
    base = save_base("llama", tmp_path / "base")
    for rounded in (True, False):
        inner = base_model()
        inner = inner.to(torch.bfloat16) if rounded else type(inner).from_pretrained(base, dtype="bfloat16")
        torch.manual_seed(0)  # of A
        model = get_peft_model(inner, DLQATConfig(bits=3, group_size=32, init="minmax", task_type="CAUSAL_LM"))
        perturb(model)
        export_model(model, tmp_path / f"out-{rounded}", "dense", dtype="float32")
        notes = load_manifest(tmp_path / f"out-{rounded}").notes
        assert any("inv_freq rounded to bfloat16" in note for note in notes) is rounded
    _, one = load_reference(tmp_path / "out-True")
    _, other = load_reference(tmp_path / "out-False")
    assert torch.equal(one, other)


@pytest.mark.parametrize(("window", "length"), [(None, 32), (8, 32), (60, 68), (4096, 128)])
def test_prompts_are_longer_than_a_short_window(window, length):
    ids = prompt_ids(LlamaConfig(vocab_size=50, sliding_window=window), {0, 1})
    assert ids.shape == (2, length) and ids.min() >= 2
    assert torch.equal(ids, prompt_ids(LlamaConfig(vocab_size=50, sliding_window=window), {0, 1}))
