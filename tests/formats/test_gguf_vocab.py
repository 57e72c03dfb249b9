"""The tokenizer in a GGUF file is the model's own."""

from __future__ import annotations

import json
import shutil

import pytest
from export_models import EMBEDDED, adapted, llama2_tokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer

from peft_dlqat import export_model
from peft_dlqat.formats.gguf_vocab import pre_tokenizer, puts_space_first

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
    assert "pass tokenizer=" in capsys.readouterr().err


def test_a_way_of_splitting_that_has_no_name_is_said(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED, base)
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"String": "q"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    adapted("embedded", bits=4).save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "out", "gguf", base=base, verify=False)
    assert fields(tmp_path / "out")["tokenizer.ggml.pre"] == "default"
    assert "splits text in a way that has no name here" in capsys.readouterr().err


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


def test_merges_become_scores(tmp_path, capsys):
    """Of a tokenizer with bytes for what is unknown, whose tokenizer.model is not there."""
    tokenizer = llama2_tokenizer()
    tokenizer.backend_tokenizer.decoder = None
    tokenizer.add_tokens("<pad>", special_tokens=True)
    export_model(adapted("embedded", bits=4), tmp_path / "out", "gguf", tokenizer=tokenizer, verify=False)
    found = fields(tmp_path / "out")
    tokens, kinds, scores = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    by_token = dict(zip(tokens, scores, strict=True))
    assert len(tokens) == 2048 and [by_token["".join(m)] for m in merges] == [-float(n) for n in range(len(merges))]
    assert by_token["<pad>"] == by_token["a"] == -float(len(merges))
    kind = gguf.TokenType
    assert kinds[:4] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, kind.BYTE] and kinds[1000] == kind.CONTROL
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"]
    assert "order of its merges is written as scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "prepends"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}}, True),
        ({"normalizer": {"type": "Replace"}, "pre_tokenizer": None}, False),  # Gemma
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
    ],
)
def test_whether_a_space_comes_first(settings, prepends):
    assert puts_space_first(settings) is prepends


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_keeps_its_scores_and_prefix(prefix, tmp_path):
    """Llama 2's puts a space before text, Gemma's does not."""
    sentencepiece = pytest.importorskip("sentencepiece")
    base = shutil.copytree(EMBEDDED, tmp_path / "base")
    tokenizer = llama2_tokenizer()
    if not prefix:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.save_pretrained(base)
    sentencepiece.SentencePieceTrainer.train(
        input=str(EMBEDDED.parents[2] / "LICENSE"),
        model_prefix=str(base / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    adapted("embedded", bits=4).save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "out", "gguf", base=base, verify=False)
    found = fields(tmp_path / "out")
    trained = sentencepiece.SentencePieceProcessor(str(base / "tokenizer.model"))
    assert found["tokenizer.ggml.tokens"][:600] == [trained.IdToPiece(index) for index in range(600)]
    assert found["tokenizer.ggml.scores"][:600] == [trained.GetScore(index) for index in range(600)]
    assert found["tokenizer.ggml.add_space_prefix"] is prefix


def test_added_tokens_without_a_row_are_left_out(tmp_path, capsys):
    """As Gemma 3's tokenizer has one for images."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    export_model(adapted("embedded", bits=4), tmp_path / "out", "gguf", tokenizer=tokenizer, verify=False)
    assert len(fields(tmp_path / "out")["tokenizer.ggml.tokens"]) == 2048
    assert "1 tokens for which the embedding has no row are left out: <image>" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    with pytest.raises(ValueError, match=r"tokenizer has 2048 tokens, the model's embedding 96 rows; .*resize_token"):
        export_model(adapted(bits=4), tmp_path / "out", "gguf", tokenizer=tokenizer, verify=False)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("generation", [None, {"bos_token_id": 7, "eos_token_id": [9, 1]}])
def test_special_tokens_that_only_the_configs_have(generation, tmp_path):
    """As Qwen's tokenizers have no start token; generation_config.json comes before config.json."""
    base = shutil.copytree(EMBEDDED, tmp_path / "base")
    (base / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token"):
        settings.pop(name, None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    adapted("embedded", bits=4).save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "out", "gguf", base=base, verify=False)
    found = {name: value for name, value in fields(tmp_path / "out").items() if name.endswith("_token_id")}
    bos, eos, more = (7, 9, {"tokenizer.ggml.eot_token_id": 1}) if generation else (0, 1, {})
    assert found.pop("tokenizer.ggml.padding_token_id", None) in (None, 2)
    assert found == {"tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.eos_token_id": eos, **more}


def test_how_tokens_are_drawn(tmp_path):
    """From generation_config.json, as llama.cpp's own converter."""
    base = shutil.copytree(EMBEDDED, tmp_path / "base")
    drawn = {
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.5,
        "temperature": 0.25,
        "repetition_penalty": 1.5,
        "min_p": 0.0,
    }
    (base / "generation_config.json").write_text(json.dumps(drawn))
    adapted("embedded", bits=4).save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "out", "gguf", base=base, verify=False)
    found = fields(tmp_path / "out")
    assert {name.split(".")[-1]: found[name] for name in found if ".sampling." in name} == {
        "top_k": 20,
        "top_p": 0.5,
        "min_p": 0.0,
        "temp": 0.25,
        "penalty_repeat": 1.5,
    }
    assert found["general.type"] == "model" and found["general.size_label"] == "2.9M"
