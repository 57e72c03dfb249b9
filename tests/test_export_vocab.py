"""The tokenizer in a GGUF file is the model's own."""

from __future__ import annotations

import json
import shutil

import pytest
from export_models import EMBEDDED, adapted
from transformers import AutoTokenizer

from peft_dlqat import export_model
from peft_dlqat.export.gguf_vocab import pre_tokenizer

gguf = pytest.importorskip("gguf")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fields(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


def test_tokens_merges_and_special_tokens(tmp_path):
    export_model(adapted("embedded", bits=4), tmp_path / "out", "gguf", verify=False)
    found = fields(tmp_path / "out")
    content = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert len(found["tokenizer.ggml.tokens"]) == 2048
    assert all(found["tokenizer.ggml.tokens"][index] == token for token, index in vocabulary.items())
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    assert found["tokenizer.ggml.merges"] == merges
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.ggml.token_type"][:3] == [gguf.TokenType.CONTROL] * 3
    assert found["general.architecture"] == "llama" and found["llama.block_count"] == 3


def test_a_chat_template_travels(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    export_model(adapted("embedded", bits=4), tmp_path / "out", "gguf", tokenizer=tokenizer, verify=False)
    assert fields(tmp_path / "out")["tokenizer.chat_template"] == tokenizer.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_model_without_tokenizer_says_so(tmp_path, capsys):
    export_model(adapted(bits=4), tmp_path / "out", "gguf", verify=False)
    assert fields(tmp_path / "out")["tokenizer.ggml.model"] == "none"
    assert "pass tokenizer=" in capsys.readouterr().out


def test_a_padded_vocabulary(tmp_path):
    """Models have rows for tokens that the tokenizer does not know."""
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED, base)
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    del vocabulary[last]
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m).replace(" ", "") != last]
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    model = adapted("embedded", bits=4)
    model.save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "out", "gguf", base=base, verify=False)
    found = fields(tmp_path / "out")
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD2047]"
    assert found["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "use_regex": True}], "gpt-2"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}}, {"type": "ByteLevel", "use_regex": False}], "llama-bpe"),
        (
            [
                {"type": "Split", "pattern": {"Regex": LLAMA3.replace("{1,3}", "")}},
                {"type": "ByteLevel", "use_regex": False},
            ],
            "qwen2",
        ),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": r"\w+"}}, {"type": "ByteLevel", "use_regex": False}], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_pre_tokenizers_are_known_by_what_they_do(steps, name):
    assert pre_tokenizer({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}) == name
    if len(steps) == 1:
        assert pre_tokenizer({"pre_tokenizer": steps[0]}) == name
