"""Text for `finetune.py`: from the Hub, from a file, from a folder, or the small text that comes with the examples.

Whatever the source, the text ends as blocks of token ids, all of one length, as causal language models are trained on.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class InputError(ValueError):
    """A mistake in the arguments, as opposed to one in the program."""


def embedded_blocks(tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out blocks of Python's language reference, which the embedded model has never seen."""
    from embedded.text import chunks, split, topics

    train, held_out = (datasets.Dataset.from_dict({"text": texts}) for texts in split(chunks(topics())))
    return to_blocks(train, "text", tokenizer, length), to_blocks(held_out, "text", tokenizer, length)


def dataset_blocks(
    name: str,
    config: str | None,
    split: str,
    eval_split: str | None,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out blocks of a dataset; without `eval_split` the last tenth of the blocks is held out."""
    train = to_blocks(load(name, config, split, column), column, tokenizer, length)
    if eval_split is not None:
        return train, to_blocks(load(name, config, eval_split, column), column, tokenizer, length)
    if len(train) < 2:
        raise InputError(
            f"{name} gives one block of {length} tokens, and nothing to hold out; give more text, a smaller --length, "
            "or an --eval_split."
        )
    cut = len(train) - max(1, len(train) // 10)
    return train.select(range(cut)), train.select(range(cut, len(train)))


def load(name: str, config: str | None, split: str, column: str) -> datasets.Dataset:
    """The rows of one split of a Hub id, a file or a folder, checked to have the column of text."""
    try:
        rows = (
            _load(Path(name), config, split)
            if Path(name).exists()
            else datasets.load_dataset(name, config, split=split)
        )
    except (OSError, ValueError) as error:  # not found, no connection; unknown config or split
        raise InputError(
            f"cannot load the dataset {name!r} (config {config!r}, split {split!r}): {error}\n--dataset takes an id "
            f"on the Hub, a file ({', '.join(FILE_FORMATS)}), or a folder of such files or of save_to_disk."
        ) from error
    if column not in rows.column_names:
        raise InputError(f"{name} has no column {column!r}; name one of {rows.column_names} by --text_column.")
    if len(rows) and not isinstance(rows[0][column], str | None):
        raise InputError(f"column {column!r} of {name} holds {type(rows[0][column]).__name__}, not text.")
    return rows


def _load(path: Path, config: str | None, split: str) -> datasets.Dataset:
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise InputError(f"{path} is none of the known kinds of file: {', '.join(FILE_FORMATS)}.")
        # A paragraph a row: end-of-text tokens go between rows, and lines are too short for that.
        options: dict[str, Any] = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split, **options)
    if not (path / "dataset_dict.json").exists() and not (path / "state.json").exists():
        return datasets.load_dataset(str(path), config, split=split)
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"it has the splits {list(saved)}")
    return saved[split]


def to_blocks(
    rows: datasets.Dataset, column: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> datasets.Dataset:
    """Blocks of `length` token ids, the texts one after another with an end-of-text token between them.

    An incomplete last block of every ten thousand rows is dropped.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def join_and_cut(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[column] if text]
        if not texts:
            return {"input_ids": []}
        ids = list(
            chain.from_iterable(
                row + end for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            )
        )
        return {"input_ids": [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]}

    blocks = rows.map(
        join_and_cut, batched=True, batch_size=10_000, remove_columns=rows.column_names, desc="tokenizing"
    )
    if len(blocks) == 0:
        raise InputError(
            f"the text is shorter than one block of {length} tokens; give more text or a smaller --length."
        )
    return blocks.with_format("torch")
