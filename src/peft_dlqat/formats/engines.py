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

    It is held to logits that its own arithmetic gives for the same weights: float32, but for `dense_dtype` and `gelu`.

    Attributes:
        name: its name.
        module: what must be importable.
        logits: (folder, ids [prompts, tokens]) -> logits [prompts, tokens, vocabulary], float32.
        largest_kl: KL divergence in nats a token up to which it agrees.
        largest_difference: of a logit, up to which it agrees, as a part of the largest logit. KL alone does not see
            what is added to all logits of a token.
        knows: whether it can load the model in a folder of the format, such as its architecture.
        dense_dtype: to which it rounds tensors that are not quantized; None if to none.
        gelu: GELU by its tanh formula, as the engine computes it; None if as torch does.
        served: as `logits`, but as users run it, where that has fewer digits than the file. It is shown, not judged.
    """

    name: str
    module: str
    logits: Callable[[Path, torch.Tensor], torch.Tensor]
    largest_kl: float = 1e-9
    largest_difference: float = 1e-5
    knows: Callable[[Path], bool] = lambda folder: True
    dense_dtype: torch.dtype | None = None
    gelu: Callable[[torch.Tensor], torch.Tensor] | None = None
    served: Callable[[Path, torch.Tensor], torch.Tensor] | None = None

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


TRANSFORMERS = Engine("transformers", "transformers", _transformers)
