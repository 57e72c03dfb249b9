"""A refused call: the right error, the right words, and nothing changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import perturb, tiny_model, tokens
from peft import PeftModel, get_peft_model
from torch import nn

from peft_dlqat import DLQATConfig
from peft_dlqat.layer import DLQATLayer

NAN, INF = float("nan"), float("inf")


@contextmanager
def refused(
    error: type[Exception] | tuple[type[Exception], ...],
    *says: str,
    model: nn.Module | None = None,
    folder: Path | None = None,
    draws: bool = False,
) -> Iterator[None]:
    """The call inside raises.

    Args:
        error: type of the error.
        says: what the message contains: the value, the rule, the remedy.
        model: a model that stays as it was.
        folder: a folder whose files stay as they were.
        draws: whether random numbers may be drawn before the call is refused.
    """
    before = snapshot(model, folder, draws)
    with pytest.raises(error) as caught:
        yield
    missing = [words for words in says if words not in str(caught.value)]
    assert not missing, f"{str(caught.value)!r} does not say {missing}"
    after = snapshot(model, folder, draws)
    harm = [what for what in before | after if before.get(what) != after.get(what)]
    assert not harm, f"the refused call changed {harm}"


def snapshot(model: nn.Module | None = None, folder: Path | None = None, draws: bool = False) -> dict[str, Any]:
    """All that a refused call could change."""
    seen: dict[str, Any] = {}
    if not draws:
        seen["torch's random numbers"] = bits_of(torch.get_rng_state())
        seen["other random numbers"] = str((np.random.get_state(), random.getstate()))
    for path in folder.rglob("*") if folder else ():
        seen[f"file {path}"] = path.is_file() and path.read_bytes()
    if model is not None:
        seen["adapters"] = sorted(getattr(model, "peft_config", {}))
        seen |= {f"tensor {name}": (t.dtype, bits_of(t)) for name, t in model.state_dict().items()}
        seen |= {f"requires_grad of {name}": p.requires_grad for name, p in model.named_parameters()}
        for name, module in model.named_modules():
            merged = list(module.merged_adapters) if isinstance(module, DLQATLayer) else None
            seen[f"module {name}"] = (type(module), module.training, merged)
        with torch.random.fork_rng():
            seen["logits"] = bits_of(outputs(model))
    return seen


def bits_of(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes: NaN equals itself."""
    return tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    """Logits in eval mode; the model's modes stay."""
    modes = {module: module.training for module in model.modules()}
    logits = model.eval()(input_ids=tokens(batch=2)).logits
    for module, mode in modes.items():
        module.training = mode
    return logits


def small_config(**settings: Any) -> DLQATConfig:
    """A valid config, but for the given settings."""
    return DLQATConfig(**{"group_size": 32, "r": 4, "init": "minmax", **settings})


def adapted(base: nn.Module | None = None, seed: int = 0, **settings: Any) -> PeftModel:
    """A Llama, a tiny one by default, with an adapter on two layers of each block, moved as training would."""
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(base or tiny_model(), small_config(**settings))
    perturb(model, seed)
    return model.eval()


def both_active() -> PeftModel:
    """`adapted` with a second adapter, on another grid and one other layer of each block; both are active."""
    model = adapted()
    model.add_adapter("second", small_config(bits=3, zero_point="float", target_modules=["q_proj", "v_proj"]))
    perturb(model, seed=2)
    with pytest.warns(UserWarning, match="lies on no grid"):
        model.base_model.set_adapter(["default", "second"])
    return model.eval()
