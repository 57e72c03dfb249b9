"""Training and held-out token ids: text that the model makes up itself, as in LLM-QAT, or Python's documentation."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dlqat import generate_dataset

EMBEDDED = Path(__file__).resolve().parents[2] / "examples" / "embedded"


def make_tokens(
    model_id: str, name: str, train: int, heldout: int, length: int = 256, folder: Path = Path("outputs", "tokens")
) -> Path:
    """A safetensors file with `train` [train, length] and `heldout` [heldout, length], made once.

    What a sequence lacks when it ends early is taken from the next, as with blocks of text.
    """
    path = folder / f"{name}-{train}-{heldout}-{length}.safetensors"
    if path.exists():
        return path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_id).eval(), AutoTokenizer.from_pretrained(model_id)
    wanted, ids, seed = (train + heldout) * length, [], 0
    while len(ids) < wanted:
        made = generate_dataset(model, tokenizer, train + heldout, length=length, batch_size=64, seed=seed)
        ids += [token for row in made["input_ids"] for token in row]
        seed += 1
    rows = torch.tensor(ids[:wanted]).view(-1, length).int()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"train": rows[:train].contiguous(), "heldout": rows[train:].contiguous()}, path)
    return path


def python_tokens(
    model_id: str, name: str, train: int, heldout: int, length: int = 256, folder: Path = Path("outputs", "tokens")
) -> Path:
    """The same of real text, and of another domain: the standard library's docstrings, and its language reference.

    Returns:
        A file with at most `train` and `heldout` rows of docstrings, and as `other` at most `train` of the reference.
    """
    path = folder / f"{name}-python-{train}-{heldout}-{length}.safetensors"
    if path.exists():
        return path
    sys.path.insert(0, str(EMBEDDED))
    from text import chunks, docstrings, split, token_blocks, topics

    tokenizer = AutoTokenizer.from_pretrained(model_id)
    (trained, held_out), (other, _) = split(docstrings()), split(chunks(topics()))
    texts = {"train": (trained, train), "heldout": (held_out, heldout), "other": (other, train)}
    folder.mkdir(parents=True, exist_ok=True)
    rows = {split: token_blocks(each, tokenizer, length)[:most] for split, (each, most) in texts.items()}
    save_file({split: ids.int().contiguous() for split, ids in rows.items()}, path)
    return path
