"""Training and held-out token ids: text that the model makes up itself, as in LLM-QAT, or Python's documentation."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dlqat import generate_dataset

EMBEDDED = Path(__file__).resolve().parents[1] / "examples" / "embedded"


def fingerprint(model_id: str, tokens: Path | None = None) -> str:
    """What tells a model, and the tokens that it is trained and measured on, from others: 16 hex digits.

    Of a folder its weights count, of a model on the Hub its id.
    """
    folder = Path(model_id)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder.is_dir() else []
    digest = hashlib.blake2b(digest_size=8)
    for path in [*files, *([tokens] if tokens else [])]:
        with path.open("rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
    if not files:
        digest.update(model_id.encode())
    return digest.hexdigest()


def _write(path: Path, rows: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: ids.int().contiguous() for name, ids in rows.items()}, temporary)
    return temporary.replace(path)


def make_tokens(
    model_id: str, name: str, train: int, heldout: int, length: int = 256, folder: Path = Path("outputs", "tokens")
) -> Path:
    """A safetensors file with `train` [train, length] and `heldout` [heldout, length], made once.

    What a sequence lacks when it ends early is taken from the next, as with blocks of text.
    """
    path = folder / f"{name}-{fingerprint(model_id)}-{train}-{heldout}-{length}.safetensors"
    if path.exists():
        return path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_id).eval(), AutoTokenizer.from_pretrained(model_id)
    wanted, ids, seed = (train + heldout) * length, [], 0
    while len(ids) < wanted:
        made = generate_dataset(model, tokenizer, train + heldout, length=length, batch_size=64, seed=seed)
        ids += [token for row in made["input_ids"] for token in row]
        seed += 1
    rows = torch.tensor(ids[:wanted]).view(-1, length)
    return _write(path, {"train": rows[:train], "heldout": rows[train:]})


def python_tokens(
    model_id: str, name: str, train: int, heldout: int, length: int = 256, folder: Path = Path("outputs", "tokens")
) -> Path:
    """The same of real text, and of another domain: the standard library's docstrings, and its language reference.

    Returns:
        A file with at most `train` and `heldout` rows of docstrings, and as `other` at most `train` of the reference.
    """
    path = folder / f"{name}-{fingerprint(model_id)}-python-{train}-{heldout}-{length}.safetensors"
    if path.exists():
        return path
    sys.path.insert(0, str(EMBEDDED))
    from text import chunks, docstrings, split, token_blocks, topics

    tokenizer = AutoTokenizer.from_pretrained(model_id)
    (trained, held_out), (other, _) = split(docstrings()), split(chunks(topics()))
    texts = {"train": (trained, train), "heldout": (held_out, heldout), "other": (other, train)}
    return _write(path, {name: token_blocks(each, tokenizer, length)[:most] for name, (each, most) in texts.items()})
