"""compressed-tensors holds the merged model, as transformers loads it."""

from __future__ import annotations

import importlib.metadata
import json
from itertools import product

import pytest
import torch
from conftest import perturb, say_calibrated
from export_models import adapted, as_id, assert_same, exported_logits, held, held_grids, merged_logits, needs
from peft import get_peft_model
from transformers import Llama4ForCausalLM, Llama4TextConfig

from peft_dlqat import DLQATConfig, export_model
from peft_dlqat.export.manifest import load_reference


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", held_grids("compressed-tensors", (32, 128, -1)), ids=as_id)
def test_compressed_tensors_holds_the_merged_model(setting, tmp_path):
    needs("compressed-tensors")
    model = adapted(**setting)
    assert_same(export_model(model, tmp_path / "out", "compressed-tensors"), "compressed-tensors")
    ids, reference = load_reference(tmp_path / "out")
    assert torch.equal(reference, merged_logits(model, ids))
    assert torch.equal(exported_logits(tmp_path / "out", ids), reference)


def test_the_version_is_in_the_config(tmp_path):
    """Packing has changed with it."""
    needs("compressed-tensors")
    export_model(adapted(bits=3), tmp_path / "out", "compressed-tensors", verify=False)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["version"] == importlib.metadata.version("compressed-tensors")


def test_an_old_version_is_refused(tmp_path, monkeypatch):
    """It would write 3 bits in another way than newer ones read."""
    needs("compressed-tensors")
    found = importlib.metadata.version
    monkeypatch.setattr(
        "peft_dlqat.formats.base.version", lambda name: "0.17.1" if name == "compressed-tensors" else found(name)
    )
    with pytest.raises(ImportError, match=r"0.17.1 is installed, but .* needs 0.18 or newer.*compressed-tensors\]"):
        export_model(adapted(bits=3), tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [16, 80, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_it_holds(size, dtype):
    assert held("compressed-tensors", size, dtype) == {*product((2, 3, 4, 8), ("none", "integer"))}


@pytest.mark.filterwarnings("ignore:.*are in no linear layer")
def test_the_experts_of_llama_4_are_refused(tmp_path):
    """transformers has another module in their place where a file is quantized, and leaves it at random values."""
    needs("compressed-tensors")
    shape = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "head_dim": 16, "vocab_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    base = Llama4ForCausalLM(Llama4TextConfig(**shape, **heads, pad_token_id=0))
    model = get_peft_model(base, DLQATConfig(bits=4, group_size=32, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    perturb(model)
    say_calibrated(model)
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.experts\.\w+: of Llama 4, .*export as 'dense'"):
        export_model(model, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())
