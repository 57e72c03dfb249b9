"""Exported models in the engines that `make test-engines` builds: llama.cpp and gptqmodel."""

from __future__ import annotations

import os

import pytest
from export_models import adapted, as_id, held_grids, llama2_tokenizer

from peft_dlqat import export_model, verify_export

# llama.cpp rounds activations to 8 bits where it multiplies with quantized weights; built with BLAS and without
# repacking, it computes products of many tokens in float32. Its GELU is a table of half precision all the same.
BLAS = bool(os.environ.get("DLQAT_BLAS"))
LLAMA_KL = 1e-8 if BLAS else 1e-3
GELU = ("gpt2", "gemma2", "gemma3", "phi")
GELU_KL = 1e-6 if BLAS else 1e-3
GPTQ_KL = 1e-6
TEXTS = (
    "Redistribution in source or binary forms, with or without modification, is permitted under this License.",
    "a model with  two spaces,\nanother line: 12345 copyright notices",
    "Größe, 数量 and 🙂 are bytes where no token knows them",
)


def figures(folder, engine):
    (found,) = verify_export(folder, engines=[engine]).figures
    print(found)
    return found


@pytest.mark.parametrize("setting", held_grids("gguf", (32, 256)), ids=as_id)
def test_llama_cpp_finds_the_trained_model(setting, tmp_path):
    pytest.importorskip("llama_cpp")
    export_model(adapted(**setting), tmp_path / "out", "gguf", verify=False)
    found = figures(tmp_path / "out", "llama-cpp-python")
    assert found.kl <= LLAMA_KL and found.agrees


@pytest.mark.parametrize(
    "kind",
    ["tied", "mistral", "qwen2", "qwen3", "gpt2", "embedded", "gemma", "gemma2", "gemma3", "phi", "phi3"],
)
def test_llama_cpp_knows_the_architecture(kind, tmp_path):
    pytest.importorskip("llama_cpp")
    export_model(adapted(kind, bits=4), tmp_path / "out", "gguf", verify=False)
    assert figures(tmp_path / "out", "llama-cpp-python").kl <= (GELU_KL if kind in GELU else LLAMA_KL)


def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path):
    """Without tokenizer.model, by the scores that stand for merges."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = llama2_tokenizer()
    export_model(adapted("embedded", bits=4), tmp_path / "out", "gguf", tokenizer=tokenizer, verify=False)
    model = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        found = model.tokenize(text.encode(), add_bos=False)
        assert tokenizer.convert_ids_to_tokens(found) == tokenizer.tokenize(text), text
    model.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", held_grids("gptq", (32, 128, -1)), ids=as_id)
def test_gptqmodel_finds_the_trained_model(setting, tmp_path):
    pytest.importorskip("gptqmodel")
    export_model(adapted("embedded", **setting), tmp_path / "out", "gptq", verify=False)  # it wants a tokenizer
    assert figures(tmp_path / "out", "gptqmodel").kl <= GPTQ_KL
