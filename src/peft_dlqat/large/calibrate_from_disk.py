"""Calibration by blocks of a model that does not fit in memory: one decoder layer's weights are loaded at a time."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm

from ..adapter_file import base_record, weight_checksum
from ..config import DLQATConfig
from ..decoder import capture, decoder_layers, hidden_states
from ..layer import DLQATLayer, adapter_layers
from ..placement import several_processes
from ..running import evaluating, random_state_kept
from ..train.blocks import BlockError, Fit, calibrate_block, check_storage, pass_through, summary
from ..train.recipe import RECIPE
from .checkpoint import Checkpoint, holder, initialise_layer, skeleton, weights_folder
from .unfinished import Source, State, Unfinished, check_new, unfinished

_ADAPTER = "default"


def calibrate_blocks_from_disk(
    model_id: str | Path,
    config: DLQATConfig,
    batches: Iterable[Mapping[str, Any]],
    output_dir: str | Path,
    steps: int = RECIPE.block_steps,
    lr: float = RECIPE.calibration_lr,
    progress: bool = True,
    train_adapter: bool = False,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> list[BlockError]:
    """[`calibrate_blocks`] for a causal language model on disk, of which one decoder layer is in memory at a time.

    Writes the adapter that loading the model, `get_peft_model` and `calibrate_blocks` give after the same
    `torch.manual_seed`, to the bit. Runs on the CPU. In memory are, beside one layer's weights and what its
    optimiser steps need, two copies of all hidden states (on disk with `cache_dir`), before the first layer the
    embedding, and at the end the adapter, which until then is in files beside `output_dir`, layer by layer. If it is
    killed, the same call goes on there: what was calibrated is only run through, and after the same
    `torch.manual_seed` the result is the same, too.

    Args:
        model_id: folder or hub id (with `config.revision`) of a model in safetensors.
        config: the adapter to make; it may neither train biases nor have `modules_to_save`.
        batches: as `calibrate_blocks`, on the CPU.
        output_dir: folder to make and save the adapter in; appears when all is done. `PeftModel.from_pretrained`
            loads it.
        steps: as `calibrate_blocks`.
        lr: as `calibrate_blocks`.
        progress: show a progress bar.
        train_adapter: fit A, B, m and the shift too.
        cache_dir: an existing folder to keep hidden states in meanwhile, rather than in memory; a run that is killed
            leaves them there.
        dtype: dtype of the weights, and so of the computation; defaults to the one that the model's config names.

    Returns:
        A [`BlockError`] for each decoder layer that holds the adapter.

    Raises:
        RuntimeError: if several processes were started, by torchrun, say, or another works for this `output_dir`.
        FileExistsError: if `output_dir` exists.
        OSError: if it cannot be written at the end; the message says where the adapter is.
        FileNotFoundError: if the model is not stored as safetensors.
        NoDecoderLayers: a ValueError; load such a model and use [`calibrate`].
        ValueError: for an impossible argument or config, no batches, a file whose tensors are not the model's, or an
            unfinished calibration for this `output_dir` with other arguments, batches or weights.
        FloatingPointError: if an error turns NaN or infinite; nothing is written then.
    """
    fit = Fit(_ADAPTER, steps, lr, train_adapter, config.init)
    check_storage(fit, config)
    if several_processes() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            "calibrate_blocks_from_disk works in one process, and each of these would do all of it and write the same "
            f"folder, {str(output_dir)!r}; run it by itself, with python instead of torchrun, before the training."
        )
    output = Path(output_dir)
    check_new(output)
    if config.modules_to_save or config.bias != "none":
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r} and bias={config.bias!r}: training other parts of the base "
            "needs the model in memory; leave them out, or load the model and use calibrate_blocks()."
        )
    folder = weights_folder(model_id, config.revision)
    inner = skeleton(folder, str(model_id), dtype)
    weights = Checkpoint(folder, inner)
    config = copy.deepcopy(config)
    config.base_model_name_or_path = str(model_id)
    model = get_peft_model(inner, config, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    blocks = decoder_layers(inner, _ADAPTER)
    _check_inside(inner, blocks)

    errors: list[BlockError] = []
    checksums: dict[str, str] = {}
    with unfinished(output) as done, evaluating(model), hidden_states(cache_dir) as hidden:
        before = [name for name in weights.names if not name.startswith(tuple(f"{block}." for block in blocks))]
        weights.load(inner, [name for name in before if name not in _head(inner)])
        with random_state_kept():
            calls = capture(inner, list(blocks.values()), batches, hidden)
        weights.release(inner, before)
        source = Source(config, fit, calls, hidden)
        bar = tqdm(blocks.items(), desc="calibrating blocks", disable=not progress)
        for index, (name, block) in enumerate(bar):
            own = [tensor for tensor in weights.names if tensor.startswith(f"{name}.")]
            weights.load(inner, own)
            for part, layer in block.named_modules(prefix=name):
                if isinstance(layer, DLQATLayer):
                    initialise_layer(model, _ADAPTER, part, layer)
                    checksums[part] = weight_checksum(layer.frozen.original())
            calculated_from = source.add([getattr(*holder(inner, tensor)) for tensor in own])
            name, own_calls = f"base_model.model.{name}", [call[index] for call in calls]
            with random_state_kept():
                error = _put_back(model, done.get(index, calculated_from))
                if error is not None:
                    pass_through(block, own_calls, hidden)
                else:
                    try:
                        error = calibrate_block(name, block, own_calls, hidden, fit)
                    except FloatingPointError:  # it would come again
                        done.clear()
                        raise
            weights.release(inner, own)
            if config.storage != "full":  # what packing says of the adapter: it belongs to weights so stored
                for layer in block.modules():
                    if isinstance(layer, DLQATLayer):
                        layer.set_storage(_ADAPTER, config.storage)
            if error is not None:
                done.put(index, _put_away(model, name), error, calculated_from)
                errors.append(error)
                bar.set_postfix(error=f"{error.before:.3g} -> {error.after:.3g}")
        kept: dict[str, Any] = model.peft_config[_ADAPTER].record  # type: ignore[attr-defined, assignment]
        kept.update(
            base_record(checksums, [layer.frozen.original() for layer in adapter_layers(inner, _ADAPTER)[1].values()])
        )
        kept["calibration"] = asdict(summary(errors, fit))
        if config.storage != "full":
            kept["storage"] = config.storage
        shutil.rmtree(done.folder / "adapter", ignore_errors=True)  # of a run that was killed there
        _save(model, done.state(), done.folder / "adapter")
        _put_in_place(done, output)
    return errors


def _put_in_place(done: Unfinished, output: Path) -> None:
    """Rename the finished adapter, or where it cannot take its place any more, keep it elsewhere."""
    finished = done.folder / "adapter"
    try:
        os.rename(finished, output)
    except OSError as error:
        try:
            kept = Path(tempfile.mkdtemp(dir=output.parent, prefix=f"{output.name}-")) / "adapter"
        except OSError:
            kept = Path(tempfile.mkdtemp(prefix=f"{output.name}-")) / "adapter"
        shutil.move(finished, kept)
        done.clear()
        raise OSError(
            error.errno,
            f"output_dir={str(output)!r} cannot be written any more ({error.strerror}); the adapter is in "
            f"{str(kept)!r}",
        ) from error
    done.clear()


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


def _put_away(model: PeftModel, prefix: str) -> State:
    """Take the adapters out of a decoder layer, so that those of one layer at a time are in memory."""
    state = {f"{prefix}.{name}": tensor for name, tensor in model.get_submodule(prefix).state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if ".dlqat_" in name}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)[leaf] = tensor.to("meta")  # type: ignore[index]
    return state


@torch.no_grad()
def _put_back(model: PeftModel, found: tuple[State, BlockError] | None) -> BlockError | None:
    """Write what was kept of a decoder layer into it, whose adapters have just been made anew; its error."""
    if found is None:
        return None
    for name, tensor in found[0].items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)[leaf].copy_(tensor)  # type: ignore[index]
    return found[1]


def _save(model: PeftModel, state: State, folder: Path) -> None:
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
