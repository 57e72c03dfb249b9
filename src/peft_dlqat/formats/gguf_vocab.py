"""The tokenizer's part of a GGUF file, from a transformers tokenizer's files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What llama.cpp itself knows to end a text.
_KNOWN_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<|return|>", "<|call|>"),
}
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
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
        if content:
            writer.add_add_space_prefix(puts_space_first(content))  # Gemma's does not
    elif model.get("type") == "BPE":
        notes = (_write_fallback if model.get("byte_fallback") else _write_bpe)(writer, content, config)
    else:
        writer.add_tokenizer_model("none")
        return ["the model came without a BPE or SentencePiece tokenizer: the file has none, and takes token ids only"]
    special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=config.vocab_size)
    notes += _add_special_tokens(special.special_token_ids, content, folder, config)
    special.add_to_gguf(writer, quiet=True)
    return notes


def _add_special_tokens(
    special: dict[str, int], content: dict[str, Any], folder: Path, config: PretrainedConfig
) -> list[str]:
    """Add what only the configs say: start, end and padding, and further tokens that end a text.

    Args:
        special: token ids by llama.cpp's kind of token, from the tokenizer's files.
        content: of tokenizer.json.
        folder: may hold generation_config.json.
        config: the model's config.

    Returns:
        What the user should know.
    """
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ends: list[int] = []
    for source in (generation, vars(config)):
        for kind in ("bos", "eos", "pad"):
            found = source.get(f"{kind}_token_id")
            ids = [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]
            ids = [token for token in ids if 0 <= token < config.vocab_size]
            if ids:
                special.setdefault(kind, ids[0])
            if kind == "eos":
                ends += ids
    texts = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    further = [t for t in dict.fromkeys(ends) if t not in special.values() and texts.get(t) not in _KNOWN_ENDS]
    for kind in ("eot", "eom"):
        if further and kind not in special:
            special[kind] = further.pop(0)
    if not further:
        return []
    return [f"GGUF has no place for more tokens that end a text: llama.cpp does not stop at {further}"]


def write_sampling(writer: Any, folder: Path) -> None:
    """Write how generation_config.json, if there is one, wants tokens to be drawn."""
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key, kind, add in (
        ("top_k", int, writer.add_sampling_top_k),
        ("top_p", float, writer.add_sampling_top_p),
        ("min_p", float, writer.add_sampling_min_p),
        ("temperature", float, writer.add_sampling_temp),
        ("repetition_penalty", float, writer.add_sampling_penalty_repeat),
    ):
        if isinstance(generation.get(key), int | float):
            add(kind(generation[key]))


def _write_sentencepiece(writer: Any, vocab: Any, config: PretrainedConfig) -> list[str]:
    tokens, scores, kinds = (list(column) for column in zip(*vocab.all_tokens(), strict=True))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    return _write_tokens(writer, [token.decode() for token in tokens], kinds, config, scores)


def _write_fallback(writer: Any, content: dict[str, Any], config: PretrainedConfig) -> list[str]:
    """BPE with bytes for what is unknown, as transformers keeps SentencePiece's: scores stand for the merges."""
    merges = content["model"]["merges"]
    made = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    ranks = {token: rank for rank, token in reversed(list(enumerate(made)))}  # the first merge that makes the token
    tokens, kinds = _tokens(content)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(puts_space_first(content))
    notes = _write_tokens(writer, tokens, kinds, config, [-float(ranks.get(token, len(made))) for token in tokens])
    return [
        *notes,
        "the tokenizer has no tokenizer.model: the order of its merges is written as scores, by which llama.cpp joins "
        "any two pieces that make a token; it may cut some text into other tokens, so compare",
    ]


def _write_bpe(writer: Any, content: dict[str, Any], config: PretrainedConfig) -> list[str]:
    tokens, kinds = _tokens(content)
    writer.add_tokenizer_model("gpt2")
    pre = pre_tokenizer(content)
    writer.add_tokenizer_pre(pre or "default")
    notes = _write_tokens(writer, tokens, kinds, config)
    if pre is None:
        notes.append(
            "the tokenizer splits text in a way that has no name here: GGUF says 'default', and llama.cpp may cut "
            "some text into other tokens; compare, and set tokenizer.ggml.pre by hand where it does"
        )
    return notes


def _tokens(content: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens of a tokenizer.json by id, and their kinds."""
    import gguf

    model = content["model"]
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    by_id = {index: token for token, index in model["vocab"].items()}
    by_id.update({index: token["content"] for index, token in added.items()})
    tokens, kinds = [], []
    for index in range(max(by_id) + 1):
        token = by_id.get(index, f"[PAD{index}]")
        kind = gguf.TokenType.NORMAL
        if index not in by_id:
            kind = gguf.TokenType.UNUSED
        elif model.get("byte_fallback") and token == model.get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        elif model.get("byte_fallback") and _BYTE.fullmatch(token):
            kind = gguf.TokenType.BYTE
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        tokens.append(token)
        kinds.append(int(kind))
    return tokens, kinds


def _write_tokens(
    writer: Any, tokens: list[str], kinds: list[int], config: PretrainedConfig, scores: list[float] | None = None
) -> list[str]:
    """Write as many tokens as the embedding has rows; returns what the user should know."""
    import gguf

    rows = config.vocab_size
    excess, apart = tokens[rows:], (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    if any(kind not in apart for kind in kinds[rows:]):  # text would be cut into tokens that the model does not know
        raise ValueError(
            f"the tokenizer has {len(tokens)} tokens, the model's embedding {rows} rows; pass the tokenizer that the "
            "model was trained with, or call model.resize_token_embeddings(...) before training."
        )
    missing = range(len(tokens), rows)
    writer.add_token_list([*tokens[:rows], *(f"[PAD{index}]" for index in missing)])
    writer.add_token_types([*map(int, kinds[:rows]), *[int(gguf.TokenType.UNUSED)] * len(missing)])
    if scores is not None:
        writer.add_token_scores([*scores[:rows], *[-1000.0] * len(missing)])
    if excess:
        return [f"{len(excess)} tokens for which the embedding has no row are left out: {', '.join(excess[:5])}"]
    return []


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


def puts_space_first(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before text."""
    steps = [content.get("normalizer") or {}, content.get("pre_tokenizer") or {}]
    steps = [inner for step in steps for inner in step.get("normalizers", step.get("pretokenizers", [step]))]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
