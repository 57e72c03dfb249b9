"""The tokenizer's part of a GGUF file, from a transformers tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

# The text that llama.cpp's pre-tokenizers are told apart by is their regular expression; these are the starts or marks
# of those that are in wide use.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
_TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"


def write_vocab(writer: Any, folder: Path, config: PretrainedConfig) -> list[str]:
    """Write tokens, merges, special tokens and chat template of the tokenizer in a folder.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: holds tokenizer.json or tokenizer.model, and tokenizer_config.json.
        config: the model's config; its vocabulary may be padded.

    Returns:
        What the user should know.
    """
    import gguf

    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = content.get("model", {})
    if (folder / "tokenizer.model").is_file():
        notes = _write_sentencepiece(writer, gguf.SentencePieceVocab(folder), config)
    elif model.get("byte_fallback"):
        notes = _write_sentencepiece(writer, gguf.LlamaHfVocab(folder), config)
    elif model.get("type") == "BPE":
        notes = _write_bpe(writer, content, config)
    else:
        writer.add_tokenizer_model("none")
        return ["the model came without a BPE or SentencePiece tokenizer: the file has none, and takes token ids only"]
    special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=config.vocab_size)
    special.add_to_gguf(writer, quiet=True)
    return notes


def _write_sentencepiece(writer: Any, vocab: Any, config: PretrainedConfig) -> list[str]:
    tokens, scores, kinds = zip(*vocab.all_tokens(), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    _write_tokens(writer, list(tokens), [int(kind) for kind in kinds], config)
    writer.add_token_scores([*scores, *[-1000.0] * (config.vocab_size - len(scores))])
    return []


def _write_bpe(writer: Any, content: dict[str, Any], config: PretrainedConfig) -> list[str]:
    import gguf

    added = {token["id"]: token for token in content.get("added_tokens", [])}
    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    by_id.update({index: token["content"] for index, token in added.items()})
    tokens, kinds = [], []
    for index in range(max(by_id) + 1):
        kind = gguf.TokenType.NORMAL
        if index not in by_id:
            kind = gguf.TokenType.UNUSED
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        kinds.append(int(kind))
    writer.add_tokenizer_model("gpt2")
    pre = pre_tokenizer(content)
    writer.add_tokenizer_pre(pre or "default")
    _write_tokens(writer, tokens, kinds, config)
    if pre is None:
        return [
            "the tokenizer splits text in a way that has no name here: GGUF says 'default', and llama.cpp may cut "
            "some text into other tokens; compare, and set tokenizer.ggml.pre by hand where it does"
        ]
    return []


def _write_tokens(writer: Any, tokens: list[Any], kinds: list[int], config: PretrainedConfig) -> None:
    import gguf

    missing = range(len(tokens), config.vocab_size)
    writer.add_token_list([*tokens, *(f"[PAD{index}]" for index in missing)])
    writer.add_token_types([*kinds, *[int(gguf.TokenType.UNUSED)] * len(missing)])


def pre_tokenizer(content: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text before BPE, None where it is not known."""
    outer = content.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    splits = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    kinds = [step.get("type") for step in steps]
    for mark, name in ((_LLAMA3, "llama-bpe"), (_QWEN2, "qwen2"), (_TEKKEN, "tekken")):
        if len(splits) == 1 and splits[0].startswith(mark):
            return name
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    return None
