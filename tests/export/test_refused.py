"""Exports refuse what cannot be: nothing is left on disk, and the model is as it was."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import VOCAB, say_calibrated, tiny_model
from foreign_layers import Net
from peft import LoraConfig, get_peft_model
from refusals import adapted, both_active, refused, small_config
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

from peft_dlqat import export_model, verify_export
from peft_dlqat.layer import adapter_layers


def of(base):
    return adapted(base, target_modules=None)


def opt():
    return of(tiny_model("opt"))


def gemma2():
    """Whose queries are scaled as no Gemma 2 of Google's is."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, query_pre_attn_scalar=64)
    return of(AutoModelForCausalLM.from_config(config))


def float_zeros():
    return adapted(zero_point="float")


def small_scale():
    """Below the smallest float16."""
    model = adapted()
    next(iter(adapter_layers(model)[1].values())).dlqat_scale["default"][0, 0] = 1e-9
    return model


def large_embedding():
    """Above the largest float16."""
    model = adapted()
    model.get_input_embeddings().weight.data[0, 0] = 1e6
    return model


def tokenizer_of(tokens):
    """A BPE tokenizer, whose tokens are all there is to it."""
    vocabulary = {f"t{index}": index for index in range(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[])))


def calibrated(model):
    """An adapter that was never calibrated warns."""
    if hasattr(model, "peft_config"):
        say_calibrated(model)
    return model


CT = "compressed-tensors"
FLOAT_ZEROS = (f"{CT} cannot hold bits=4, group_size=32, zero_point='float'", "use zero_point='integer'")
LONG_TOKENIZER = {"tokenizer": tokenizer_of(VOCAB + 1)}
LONG = (f"{VOCAB + 1} tokens", f"{VOCAB} rows", "resize_token_embeddings")


@pytest.mark.parametrize(
    "make, format, kwargs, says",
    [
        (adapted, "ggml", {}, ("format='ggml'", "'gguf'")),
        (adapted, "dense", {"dtype": "int8"}, ("dtype='int8'", "'bfloat16'")),
        (adapted, "gguf", {"embeddings": "q4_0"}, ("embeddings='q4_0'", "'q8_0'")),
        (adapted, "dense", {"push_to_hub": True}, ("needs repo_id",)),
        (adapted, "dense", {"base": "somewhere"}, ("base='somewhere'", "adapter on disk")),
        (adapted, "dense", {"adapter_name": "other"}, ("'other'", "the model has ['default']")),
        (tiny_model, "dense", {}, ("no DL-QAT adapter", "get_peft_model")),
        (both_active, "dense", {}, ("2 adapters are active", "adapter_name")),
        (float_zeros, CT, {}, FLOAT_ZEROS),
        (small_scale, "gguf", {}, ("has no exact float16", "scale_dtype='float16'")),
        (large_embedding, "dense", {"dtype": "float16"}, ("embed_tokens.weight: 1e+06", "pass dtype='bfloat16'")),
        (opt, "gguf", {}, ("model_type='opt'", "'llama'", f"'{CT}'")),
        (gemma2, "gguf", {}, ("query_pre_attn_scalar=64", "takes 16", f"'{CT}'")),
        (adapted, "gguf", LONG_TOKENIZER, LONG),
    ],
)
def test_an_impossible_export_is_refused(make, format, kwargs, says, tmp_path):
    model = calibrated(make())
    with refused(ValueError, *says, model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", format, **kwargs)


def test_a_base_that_is_no_transformers_model_is_refused(tmp_path):
    model = calibrated(get_peft_model(Net(), small_config(target_modules=["first", "second"])))
    with refused(TypeError, "the base model is a Net", "transformers", model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", "dense")


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = calibrated(adapted())
    with refused(FileExistsError, "exists", "new folder", model=model, folder=tmp_path):
        export_model(model, tmp_path, "dense")


def test_a_format_without_its_package_is_refused(monkeypatch, tmp_path):
    find, model = importlib.util.find_spec, calibrated(adapted())
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    says = ("needs the package gguf", "pip install 'peft-dlqat[gguf]'")
    with refused(ImportError, *says, model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", "gguf")


def test_another_base_than_the_one_trained_on_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    base = tiny_model()
    base.model.layers[0].self_attn.q_proj.weight.data += 0.01
    base.save_pretrained(tmp_path / "base")
    says = ("1 of 4 weights", "are not those that the adapter was trained on", "q_proj", "base=...")
    with refused(ValueError, *says, folder=tmp_path):
        export_model(tmp_path / "adapter", tmp_path / "out", "dense", base=tmp_path / "base")


def test_an_adapter_that_names_no_base_is_refused(tmp_path):
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = model.base_model.model.name_or_path = None
    model.save_pretrained(tmp_path / "adapter")
    with refused(ValueError, "base model", "base=...", folder=tmp_path):
        export_model(tmp_path / "adapter", tmp_path / "out", "dense")


def test_an_adapter_of_another_method_is_refused(tmp_path):
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with refused(ValueError, "LORA", "only DL-QAT adapters", folder=tmp_path):
        export_model(tmp_path / "adapter", tmp_path / "out", "dense", base=tmp_path / "base")


def test_verifying_what_is_no_export_is_refused(tmp_path):
    with refused(FileNotFoundError, "dlqat_export.json", "export_model()", folder=tmp_path):
        verify_export(tmp_path)
