"""Calibration by blocks of a model that does not fit in memory: one decoder layer's weights are loaded at a time."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm

from ..checkpoint import Weights, fetch, initialise_layer, skeleton
from ..config import DLQATConfig
from ..distillation import evaluating
from ..layer import DLQATLayer, adapter_layers
from .blocks import BlockError, Fit, calibrate_block, record
from .decoder import capture, decoder_layers, hidden_states
from .grid_state import random_state_kept

_ADAPTER = "default"


def calibrate_blocks_from_disk(
    model_id: str | Path,
    config: DLQATConfig,
    batches: Iterable[Mapping[str, Any]],
    output_dir: str | Path,
    steps: int = 200,
    lr: float = 3e-2,
    progress: bool = True,
    train_adapter: bool = False,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> list[BlockError]:
    """[`calibrate_blocks`] for a causal language model on disk, of which one decoder layer is in memory at a time.

    Writes the adapter that loading the model, `get_peft_model` and `calibrate_blocks` give after the same
    `torch.manual_seed`, to the bit. Runs on the CPU. In memory are, beside one layer's weights and what its
    optimiser steps need, the adapter and two copies of all hidden states (on disk with `cache_dir`), and before the
    first layer the embedding.

    Args:
        model_id: folder or hub id (with `config.revision`) of a model in safetensors.
        config: the adapter to make; it may neither train biases nor have `modules_to_save`.
        batches: as `calibrate_blocks`, on the CPU.
        output_dir: folder to make and save the adapter in; appears when all is done. `PeftModel.from_pretrained`
            loads it.
        steps: as `calibrate_blocks`.
        lr: as `calibrate_blocks`.
        progress: show a progress bar.
        train_adapter: fit A, B and m too.
        cache_dir: an existing folder to keep hidden states in meanwhile, rather than in memory.
        dtype: dtype of the weights, and so of the computation; defaults to the one that the model's config names.

    Returns:
        A [`BlockError`] for each decoder layer that holds the adapter.

    Raises:
        FileExistsError: if `output_dir` exists.
        FileNotFoundError: if the model is not stored as safetensors.
        NoDecoderLayers: a ValueError; load such a model and use [`calibrate`].
        ValueError: for an impossible argument or config, no batches, or a file whose tensors are not the model's.
        FloatingPointError: if an error turns NaN or infinite; nothing is written then.
    """
    fit = Fit(_ADAPTER, steps, lr, train_adapter, config.init)
    output = Path(output_dir)
    if output.exists():
        raise FileExistsError(f"output_dir={str(output)!r} exists; name a new folder, or remove it first.")
    if config.modules_to_save or config.bias != "none":
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r} and bias={config.bias!r}: training other parts of the base "
            "needs the model in memory; leave them out, or load the model and use calibrate_blocks()."
        )
    folder = fetch(model_id, config.revision)
    inner = skeleton(folder, str(model_id), dtype)
    weights = Weights(folder, inner)
    config = copy.deepcopy(config)
    config.base_model_name_or_path = str(model_id)
    model = get_peft_model(inner, config, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    blocks = decoder_layers(inner, _ADAPTER)
    _check_inside(inner, blocks)

    errors = []
    with evaluating(model), hidden_states(cache_dir) as hidden:
        before = [name for name in weights.names if not name.startswith(tuple(f"{block}." for block in blocks))]
        weights.load(inner, [name for name in before if name not in _head(inner)])
        with random_state_kept():
            calls = capture(inner, list(blocks.values()), batches, hidden)
        weights.release(inner, before)
        bar = tqdm(blocks.items(), desc="calibrating blocks", disable=not progress)
        for index, (name, block) in enumerate(bar):
            own = [tensor for tensor in weights.names if tensor.startswith(f"{name}.")]
            weights.load(inner, own)
            for part, layer in block.named_modules(prefix=name):
                if isinstance(layer, DLQATLayer):
                    initialise_layer(model, _ADAPTER, part, layer)
            with random_state_kept():
                error = calibrate_block(
                    f"base_model.model.{name}", block, [call[index] for call in calls], hidden, fit
                )
            weights.release(inner, own)
            if error is not None:
                errors.append(error)
                bar.set_postfix(error=f"{error.before:.3g} -> {error.after:.3g}")
    model.peft_config[_ADAPTER].record["calibration"] = record(errors, fit)  # type: ignore[attr-defined]
    _save(model, output)
    return errors


def _check_inside(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    inside = tuple(f"{name}." for name in blocks)
    outside = [name for name in adapter_layers(model, _ADAPTER)[1] if not name.startswith(inside)]
    if outside:
        raise ValueError(
            f"{', '.join(outside)} lie outside the decoder layers, where nothing would calibrate them; narrow "
            "target_modules or use exclude_modules."
        )


def _head(model: Any) -> set[str]:
    """Names of the output head's own tensors, which are not needed before the decoder layers."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    return {f"{name}.weight", f"{name}.bias"}


def _save(model: PeftModel, output: Path) -> None:
    """Write beside the place, then rename: there is a whole adapter or none."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        saved = Path(folder) / "adapter"
        model.save_pretrained(str(saved), save_embedding_layers=False)
        os.rename(saved, output)
