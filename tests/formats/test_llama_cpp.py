"""llama.cpp itself, from the wheel xllamacpp, finds the trained model in a GGUF file, by the file's own metadata."""

from __future__ import annotations

import ctypes
import os
from functools import partial

import pytest
import torch
from conftest import perturb, random_model, say_calibrated
from export_models import CONFIGS, EMBEDDED, GEMMA, GEMMA3, SHAPE, adapted, as_id, held_grids, llama2_tokenizer
from peft import get_peft_model
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from peft_dlqat import DLQATConfig, export_model, verify_export
from peft_dlqat.export.manifest import load_reference
from peft_dlqat.export.verify import logit_difference
from peft_dlqat.formats import llama_cpp

pytestmark = pytest.mark.xdist_group("llama.cpp")
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

LARGEST_KL = 2e-9  # all but GPT-2 with an untied head are below 1e-9
ROPE = {"rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", **ROPE, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", **ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
TIED = {**SHAPE, "tie_word_embeddings": True}
GPT2 = partial(GPT2Config, vocab_size=96, n_embd=256, n_layer=2, n_head=4, n_positions=64)
# What a GGUF file says beyond sizes; the usual ones are `CONFIGS`.
FURTHER = {
    "llama-biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-head_dim": lambda: LlamaConfig(**SHAPE, head_dim=32),
    "llama-eps": lambda: LlamaConfig(**SHAPE, rms_norm_eps=1e-2),
    "llama-linear": lambda: LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", **ROPE}),
    "llama-llama3": lambda: LlamaConfig(**SHAPE, rope_parameters={**LLAMA3, "original_max_position_embeddings": 32}),
    "llama-yarn": lambda: LlamaConfig(**SHAPE, rope_parameters=YARN),
    "llama-yarn-attention_factor": lambda: LlamaConfig(**SHAPE, rope_parameters={**YARN, "attention_factor": 2.0}),
    "llama-yarn-mscale": lambda: LlamaConfig(**SHAPE, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "mistral-no-window": lambda: MistralConfig(**SHAPE, sliding_window=None, head_dim=32),
    "qwen2-yarn": lambda: Qwen2Config(**SHAPE, rope_parameters={**YARN, "attention_factor": 2.0}),
    "qwen3-head_dim": lambda: Qwen3Config(**SHAPE, head_dim=32, rope_parameters=YARN),
    "gemma-head_dim": lambda: GemmaConfig(**TIED, head_dim=32, rope_parameters=YARN),
    "gemma2-yarn": lambda: Gemma2Config(**GEMMA, **CAPS, rope_parameters={**YARN, "attention_factor": 2.0}),
    "gemma3-capped": lambda: Gemma3TextConfig(**GEMMA3, final_logit_softcapping=3.0),
    "phi-grouped": lambda: PhiConfig(**SHAPE, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
    "phi3-partial": lambda: Phi3Config(**SHAPE, pad_token_id=0, rope_parameters=HALF),
    "phi3-tied": lambda: Phi3Config(**TIED, pad_token_id=0),
    "gpt2-inner": lambda: GPT2(n_inner=512),
    "gpt2-untied": lambda: GPT2(tie_word_embeddings=False),
}


def kl(folder):
    """Of llama.cpp, by a float32 copy of the file, against the trained model in llama.cpp's arithmetic."""
    ids, expected = load_reference(folder, "llama.cpp")
    assert ids.shape[1] > 8  # the windows of these models
    return logit_difference(expected, llama_cpp.logits(folder / "model.gguf", ids, as_float32=True)).kl


def trained(config):
    model = get_peft_model(random_model(config), DLQATConfig(group_size=32, init="minmax", task_type="CAUSAL_LM"))
    perturb(model)
    say_calibrated(model)
    return model.eval()


@pytest.mark.parametrize("kind", [*CONFIGS, *FURTHER])
def test_it_finds_the_trained_model(kind, tmp_path):
    export_model(trained((CONFIGS | FURTHER)[kind]()), tmp_path / "out", "gguf", verify=False)
    assert kl(tmp_path / "out") <= LARGEST_KL


@pytest.mark.product(every=6)
@pytest.mark.parametrize("setting", held_grids("gguf", (32, 256)), ids=as_id)
def test_it_dequantizes_to_the_trained_weights(setting, tmp_path):
    export_model(adapted(**setting), tmp_path / "out", "gguf", verify=False)
    assert kl(tmp_path / "out") <= LARGEST_KL


@pytest.mark.parametrize("bits, zero_point, size", [(2, "float", 16), (3, "none", 16), (5, "float", 32)])
def test_it_dequantizes_k_quants(bits, zero_point, size, tmp_path):
    model = adapted(bits=bits, zero_point=zero_point, group_size=size, scale_dtype="k_quant")
    export_model(model, tmp_path / "out", "gguf", embeddings="q8_0", verify=False)
    ids, expected = load_reference(tmp_path / "out", "written")
    found = llama_cpp.logits(tmp_path / "out" / "model.gguf", ids, as_float32=True)
    assert logit_difference(expected, found).kl <= LARGEST_KL


def test_an_export_is_verified_by_it_and_shows_what_is_served(tmp_path):
    """As it is built, llama.cpp rounds activations to 8 bits: that is told, and not held against the file."""
    found = export_model(adapted(bits=3), tmp_path / "out", "gguf")
    assert found.ok
    (row,) = verify_export(tmp_path / "out", engines=["llama.cpp"]).figures
    assert row.agrees and row.kl <= LARGEST_KL and row.max_difference < 1e-4
    assert 1e-6 < row.served.kl < 1e-2
    assert f"llama.cpp with its rounded activations: {row.served}" in str(found)


def test_a_wrong_key_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_dlqat.formats.gguf_metadata.rope_of", lambda config: {"rope_theta": 2e4})
    with pytest.raises(RuntimeError, match=r"llama.cpp: max difference .* DIFFERS"):
        export_model(adapted("qwen2", bits=4), tmp_path / "out", "gguf")


@pytest.mark.parametrize("content", [b"GGUF", b"", b"GGUF" + bytes(1000)])
def test_a_file_that_it_cannot_bear_does_not_end_this_process(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    for as_float32 in (True, False):
        with pytest.raises(RuntimeError, match=r"llama.cpp does not run model.gguf: .*error"):
            llama_cpp.logits(tmp_path / "model.gguf", torch.ones(1, 2, dtype=torch.long), as_float32)


def test_its_gelu_is_a_table_of_half_precision():
    x = torch.tensor([-11.0, -1.0001, 0.0, 1.0, 11.0])
    found = llama_cpp.half_gelu(x)
    assert found[0] == 0 and found[2] == 0 and found[4] == 11
    exact = torch.nn.functional.gelu(x, approximate="tanh")
    assert 0 < (found - exact).abs().max() < 1e-3
    assert torch.equal(found[1:4], found[1:4].half().float())


class Vocabulary:
    """llama.cpp's tokenizer of a GGUF file, in this process."""

    def __init__(self, folder):
        self.library = llama_cpp._Library()
        self.model, _ = llama_cpp._load(self.library, str(folder / "model.gguf"), 8)
        self.vocab = self.library.llama_model_get_vocab(self.model)

    def tokens(self, text):
        found, content = (ctypes.c_int32 * 1000)(), os.fsencode(text)
        flags = ctypes.c_bool(False), ctypes.c_bool(True)
        return list(found[: self.library.llama_tokenize(self.vocab, content, len(content), found, 1000, *flags)])

    def ends(self):
        return [i for i in range(self.library.llama_vocab_n_tokens(self.vocab)) if self.is_end(i)]

    def is_end(self, token):
        self.library.llama_vocab_is_eog.restype = ctypes.c_bool
        return bool(self.library.llama_vocab_is_eog(self.vocab, token) & 1)


TEXTS = (
    "Redistribution in source or binary forms, with or without modification, is permitted under this License.",
    "a model with  two spaces,\nanother line: 12345 copyright notices",
    "Größe, 数量 and 🙂 are bytes where no token knows them",
)


def test_it_cuts_text_as_the_tokenizer_does(tmp_path):
    """Without tokenizer.model, by the scores that stand for merges."""
    tokenizer = llama2_tokenizer()
    export_model(adapted("embedded", bits=4), tmp_path / "out", "gguf", tokenizer=tokenizer, verify=False)
    vocabulary = Vocabulary(tmp_path / "out")
    for text in TEXTS:
        assert tokenizer.convert_ids_to_tokens(vocabulary.tokens(text)) == tokenizer.tokenize(text), text


def test_it_stops_where_the_configs_say(tmp_path, capsys):
    """Also where the tokenizer does not know it; a fourth token that ends a text has no place, which is said."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = adapted("embedded", bits=4)
    model.get_base_model().config.eos_token_id = [1, 7, 8, 9]
    export_model(model, tmp_path / "out", "gguf", tokenizer=tokenizer, verify=False)
    assert Vocabulary(tmp_path / "out").ends() == [1, 7, 8]
    assert "llama.cpp does not stop at [9]" in capsys.readouterr().err


def test_gelu_is_a_table_of_half_floats_between_its_limits():
    x = torch.tensor([-10.5, -10.0, -0.3, 0.7, 9.97, 10.0, 10.3])
    table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    expected = torch.tensor([0.0, 0.0, *table[2:5].tolist(), 10.0, 10.3])
    found = llama_cpp.half_gelu(x)
    assert torch.equal(found, expected) and found[4] != 9.97
