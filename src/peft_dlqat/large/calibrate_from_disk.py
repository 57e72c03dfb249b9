"""Calibration by blocks of a model that does not fit in memory: one decoder layer's weights are loaded at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..config import DLQATConfig
from ..console import progress_bar
from ..decoder import capture, decoder_layers, hidden_states
from ..files import unfinished
from ..layer import DLQATLayer, adapter_layers
from ..module_names import folded
from ..placement import several_processes
from ..running import evaluating, random_state_kept
from ..train.blocks import BlockError, calibrate_block
from ..train.calibrate import Calibration, check_trains_what_stays, default_steps
from ..train.descent import Descent
from ..train.recipe import RECIPE
from .checkpoint import Checkpoint, initialise_layer, skeleton, weights_folder

_ADAPTER = "default"


def calibrate_from_disk(
    model_id: str | Path,
    config: DLQATConfig,
    batches: Iterable[Mapping[str, Any]],
    output_dir: str | Path,
    steps: int | None = None,
    lr: float = RECIPE.calibration_lr,
    progress: bool = True,
    train_adapter: bool = False,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Calibration:
    """[`calibrate`] by blocks for a causal language model on disk, of which one decoder layer is in memory at a time.

    Writes the adapter that loading the model, `get_peft_model` and `calibrate(by="blocks", objective="output")` give
    after the same `torch.manual_seed`, to the bit. Runs on the CPU. In memory are, beside one layer's weights and what
    its optimiser steps need, two copies of all hidden states (on disk with `cache_dir`), before the first layer the
    embedding, and the adapters of the layers that are done.

    For an output folder NAME, a run writes into `.NAME.unfinished`, beside it and in `cache_dir`. A run that is killed
    leaves these; the next one for the same output removes them.

    Args:
        model_id: folder or hub id (with `config.revision`) of a model in safetensors.
        config: the adapter to make; it may neither train biases nor have `modules_to_save`.
        batches: finitely many dicts of the model's keyword arguments, on the CPU.
        output_dir: folder to make and save the adapter in; appears when all is done. `PeftModel.from_pretrained`
            loads it.
        steps: as `calibrate` by blocks.
        lr: as `calibrate`.
        progress: show a progress bar.
        train_adapter: fit A, B, m and the shift too.
        cache_dir: an existing folder to keep hidden states in meanwhile, rather than in memory.
        dtype: dtype of the weights, and so of the computation; defaults to the one that the model's config names.

    Returns:
        A [`Calibration`].

    Raises:
        RuntimeError: if several processes were started, by torchrun, say, or another works for this `output_dir`.
        FileExistsError: if `output_dir` exists.
        OSError: if it cannot be written at the end; the message says where the adapter is.
        FileNotFoundError: if the model is not stored as safetensors.
        NoDecoderLayers: a ValueError; load such a model and use [`calibrate`].
        ValueError: for an impossible argument or config, no batches, or a file whose tensors are not the model's.
        FloatingPointError: if an error turns NaN or infinite; nothing is written then.
    """
    descent = Descent(_ADAPTER, default_steps("blocks") if steps is None else steps, lr, train_adapter)
    check_trains_what_stays(descent, config)
    if several_processes() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            "calibrate_from_disk works in one process, and each of these would do all of it and write "
            f"{str(output_dir)!r}; run it by itself, with python instead of torchrun, before the training."
        )
    output = Path(output_dir)
    if output.exists():
        raise FileExistsError(f"output_dir={str(output)!r} exists; name a new folder, or remove it first.")
    if config.modules_to_save or config.bias != "none":
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r} and bias={config.bias!r}: training other parts of the base "
            "needs the model in memory; leave them out, or load the model and use calibrate()."
        )
    folder = weights_folder(model_id, config.revision)
    inner = skeleton(folder, str(model_id), dtype)
    weights = Checkpoint(folder, inner, config)
    config = copy.deepcopy(config)
    config.base_model_name_or_path = str(model_id)
    model = get_peft_model(inner, config, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    blocks = decoder_layers(inner, _ADAPTER)
    _check_inside(inner, blocks)

    errors: list[BlockError] = []
    with unfinished(output, cache_dir) as (made, cache):
        with evaluating(model), hidden_states(cache) as hidden:
            before = [name for name in weights.names if not name.startswith(tuple(f"{block}." for block in blocks))]
            weights.load(inner, [name for name in before if name not in _head(inner)])
            with random_state_kept():
                calls = capture(inner, list(blocks.values()), batches, hidden)
            weights.release(inner, before)
            bar = progress_bar(blocks.items(), desc="calibrating blocks", shown=progress)
            for index, (name, block) in enumerate(bar):
                own = [tensor for tensor in weights.names if tensor.startswith(f"{name}.")]
                weights.load(inner, own)
                for part, layer in block.named_modules(prefix=name):
                    if isinstance(layer, DLQATLayer):
                        initialise_layer(model, _ADAPTER, part, layer)
                own_calls = [call[index] for call in calls]
                with random_state_kept():
                    error = calibrate_block(f"base_model.model.{name}", block, own_calls, hidden, descent, config.init)
                weights.release(inner, own)
                if error is not None:
                    errors.append(error)
                    bar.set_postfix(error=f"{error.before:.3g} -> {error.after:.3g}")
        for layer in adapter_layers(inner, _ADAPTER)[1].values():
            layer.set_record(_ADAPTER, calibrated=True)
            layer.set_storage(_ADAPTER, config.storage)  # what packing says of it: it belongs to weights so stored
        model.save_pretrained(str(made), save_embedding_layers=False)
    try:
        os.rename(made, output)
    except OSError as error:
        raise OSError(
            error.errno,
            f"output_dir={str(output)!r} cannot be written any more ({error.strerror}); the adapter is in "
            f"{str(made)!r}",
        ) from error
    return Calibration.of_outputs(descent.steps, errors)


def _check_inside(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    inside = tuple(f"{name}." for name in blocks)
    outside = [name for name in adapter_layers(model, _ADAPTER)[1] if not name.startswith(inside)]
    if outside:
        raise ValueError(
            f"{folded(outside)} lie outside the decoder layers, where nothing would calibrate them; narrow "
            "target_modules or use exclude_modules."
        )


def _head(model: Any) -> set[str]:
    """Names of the output head's own tensors, which are not needed before the decoder layers."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    return {f"{name}.weight", f"{name}.bias"}
