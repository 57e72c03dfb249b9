"""Datasets by name: from the Hub, from a file, or from a folder."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(name: str, config: str | None = None, split: str = "train") -> datasets.Dataset:
    """The rows of one split.

    Args:
        name: Hub id; a file of a kind in `FILE_FORMATS`; or a folder of such files, or of `save_to_disk`.
        config: configuration of the dataset.
        split: such as "train" or "train[:10%]".

    Raises:
        ValueError: for what cannot be loaded.
    """
    try:
        return _load(Path(name), config, split) if Path(name).exists() else _of_hub(name, config, split)
    except (OSError, ValueError) as error:  # not found, no connection; unknown config or split
        raise ValueError(
            f"cannot load the dataset {name!r} (config {config!r}, split {split!r}): {error}\nIt must be an id on "
            f"the Hub, a file ({', '.join(FILE_FORMATS)}), or a folder of such files or of save_to_disk."
        ) from error


def _of_hub(name: str, config: str | None, split: str) -> datasets.Dataset:
    return datasets.load_dataset(name, config, split=split)


def _load(path: Path, config: str | None, split: str) -> datasets.Dataset:
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"{path} is none of the known kinds of file: {', '.join(FILE_FORMATS)}")
        # A paragraph a row: end-of-text tokens go between rows, and lines are too short for that.
        options: dict[str, Any] = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split, **options)
    if not (path / "dataset_dict.json").exists() and not (path / "state.json").exists():
        return datasets.load_dataset(str(path), config, split=split)
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        if split != "train":
            raise ValueError("it was saved without splits, and is all 'train'")
        return saved
    if split not in saved:
        raise ValueError(f"it has the splits {list(saved)}")
    return saved[split]


def text_blocks(
    rows: datasets.Dataset, column: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> datasets.Dataset:
    """Blocks of `length` token ids, the texts one after another with an end-of-text token between them.

    An incomplete last block of every ten thousand rows is dropped.

    Raises:
        ValueError: if there is no such column of text, or less text than one block.
    """
    if column not in rows.column_names:
        raise ValueError(f"the dataset has no column {column!r}; name one of {rows.column_names} by --text_column.")
    if len(rows) and not isinstance(rows[0][column], str | None):
        raise ValueError(f"column {column!r} of the dataset holds {type(rows[0][column]).__name__}, not text.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def join_and_cut(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[column] if text]
        if not texts:
            return {"input_ids": []}
        tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = list(chain.from_iterable(row + end for row in tokens))
        return {"input_ids": [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]}

    blocks = rows.map(
        join_and_cut, batched=True, batch_size=10_000, remove_columns=rows.column_names, desc="tokenizing"
    )
    if len(blocks) == 0:
        raise ValueError(
            f"the text is shorter than one block of {length} tokens; give more text, or a smaller --length."
        )
    return blocks.with_format("torch")
