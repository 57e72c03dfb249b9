"""What an engine is: it takes a folder and token ids, and gives logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Engine:
    """A way to run an exported folder.

    Attributes:
        name: its name.
        module: what must be importable.
        logits: (folder, ids [prompts, tokens]) -> logits [prompts, tokens, vocabulary], float32.
        largest_kl: KL divergence in nats a token up to which it agrees; its own arithmetic is the reason for more
            than 0. None for the same arithmetic as the reference's, of which only the last digits may differ.
        knows: whether it can load the model in a folder of the format, such as its architecture.
    """

    name: str
    module: str
    logits: Callable[[Path, torch.Tensor], torch.Tensor]
    largest_kl: float | None
    knows: Callable[[Path], bool] = lambda folder: True

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


@torch.no_grad()
def float32_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a transformers model."""
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def _transformers(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    return float32_logits(cls.from_pretrained(folder, dtype=torch.float32), ids)


TRANSFORMERS = Engine("transformers", "transformers", _transformers, largest_kl=None)
