"""The batches of a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..running import to_device


def cycle(dataloader: Iterable[Mapping[str, Any]], steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches on the model's device: for ever, or once through where there are no steps that need them.

    Args:
        dataloader: batches, each a dict of the model's keyword arguments.
        steps: how many are needed.
        device: where to.

    Raises:
        ValueError: if the loader is empty, or ends too early and cannot be started again.
    """
    count = 0
    while True:
        before = count
        iterator = iter(dataloader)
        for batch in iterator:
            count += 1
            yield to_device(batch, device)
        if count == 0:
            raise ValueError("the calibration loader is empty; it must give at least one batch.")
        if not steps:
            return
        if count == before or iterator is dataloader:
            raise ValueError(
                f"the calibration loader ended after {count} batches, cannot be started again, and {steps} steps need "
                f"more; pass a DataLoader or a list, or steps={count}."
            )
