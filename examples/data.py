"""Text for `finetune.py`: from the Hub, from a file, from a folder, or the small text that comes with the examples.

Whatever the source, the text ends as blocks of token ids, all of one length, as causal language models are trained on.
"""

from __future__ import annotations

import datasets
from transformers import PreTrainedTokenizerBase

from peft_dlqat.cli.rows import load_rows, text_blocks


class InputError(ValueError):
    """A mistake in the arguments, as opposed to one in the program."""


def embedded_blocks(tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out blocks of Python's language reference, which the embedded model has never seen."""
    from embedded.text import chunks, split, topics

    train, held_out = (datasets.Dataset.from_dict({"text": texts}) for texts in split(chunks(topics())))
    return text_blocks(train, "text", tokenizer, length), text_blocks(held_out, "text", tokenizer, length)


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
    try:
        train = text_blocks(load_rows(name, config, split), column, tokenizer, length)
        if eval_split is not None:
            return train, text_blocks(load_rows(name, config, eval_split), column, tokenizer, length)
    except ValueError as error:
        raise InputError(str(error)) from error
    if len(train) < 2:
        raise InputError(
            f"{name} gives one block of {length} tokens, and nothing to hold out; give more text, a smaller --length, "
            "or an --eval_split."
        )
    cut = len(train) - max(1, len(train) // 10)
    return train.select(range(cut)), train.select(range(cut, len(train)))
