"""What is printed: lines and progress bars, by the main process only, and as transformers' own switches say."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm
from transformers.utils import logging

# Seconds after which a progress bar appears.
_DELAY = 1.0


def is_main_process() -> bool:
    """Whether this process is the one that prints; also under torchrun, before torch.distributed has begun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print lines to stderr, above a progress bar if any; none after `transformers.logging.set_verbosity_error()`.

    What a script prints to stdout may be read by another.
    """
    if is_main_process() and logging.get_verbosity() <= logging.WARNING:
        tqdm.write(text, file=sys.stderr)


def progress_bar(iterable: Iterable[Any] | None = None, *, desc: str, shown: bool = True, **kwargs: Any) -> Any:
    """A progress bar for what takes more than a second; none after `transformers.logging.disable_progress_bar()`.

    Args:
        iterable: what is iterated over, if anything.
        desc: what is being done.
        shown: whether there is one at all.
        kwargs: further arguments of `tqdm`, such as `total`.
    """
    return logging.tqdm(iterable, desc=desc, disable=not (shown and is_main_process()), delay=_DELAY, **kwargs)
