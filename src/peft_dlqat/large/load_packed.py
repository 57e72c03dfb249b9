"""From a checkpoint straight to packed weights: the full-precision model is never in memory as a whole."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..config import DLQATConfig
from ..console import progress_bar, say
from ..layer import adapter_layers
from ..packing import warn_if_trained
from ..record import OtherBaseWarning
from ..summary import summarize
from ..targets import check_target
from .checkpoint import Checkpoint, holder, initialise_layer, skeleton, weights_folder


def load_packed(
    model_id: str | Path,
    adapter: DLQATConfig | str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Load a causal language model with its adapted layers' weights in the config's `storage`, one layer at a time.

    The same model, to the bit, as loading it in full, `get_peft_model` or `PeftModel.from_pretrained`, and
    [`pack_weights`] give. In memory are the packed weights, all else of the model (embeddings, norms, head) in
    `dtype`, and one layer's full weight.

    Args:
        model_id: folder or hub id (with the config's `revision`) of the base model, in safetensors.
        adapter: a config with `storage`, for a new adapter, whose initial scales and zeros can move no more;
            or the folder or hub id of a saved adapter, such as [`calibrate_from_disk`] writes.
        dtype: of the weights that are not packed, and of the computation; defaults to the one that the model's config
            names.
        device: where each layer goes as soon as it is read.
        adapter_name: name of the adapter.
        is_trainable: whether a saved adapter is to be trained on; a new one always is.

    Returns:
        The model as PEFT wraps it, in eval mode.

    Raises:
        FileNotFoundError: if there is no such folder, or the model is not stored as safetensors.
        ValueError: for `storage="full"`, another task, a weight that is not finite, or a file that is damaged or whose
            tensors are not the model's.
        TypeError: if the adapter is no DL-QAT adapter.

    Example:
        ```py
        >>> model = load_packed("meta-llama/Llama-2-7b-hf", "my-adapter", dtype=torch.bfloat16, is_trainable=True)
        ```
    """
    new = isinstance(adapter, DLQATConfig)
    config = copy.deepcopy(adapter) if isinstance(adapter, DLQATConfig) else DLQATConfig.from_pretrained(str(adapter))
    if not isinstance(config, DLQATConfig):
        raise TypeError(f"adapter={str(adapter)!r} is a {config.peft_type} adapter; give one of DL-QAT, or a config.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"task_type={config.task_type!r}: only causal language models are loaded packed; load the model with "
            "from_pretrained(), and call pack_weights()."
        )
    if config.storage == "full":
        raise ValueError(
            "storage='full' packs nothing; use storage='int8', 'int4' or 'int2'. An adapter that was trained on full "
            "weights belongs to them: load the model with from_pretrained()."
        )
    folder = weights_folder(model_id, config.revision)
    inner = skeleton(folder, str(model_id), dtype)
    weights = Checkpoint(folder, inner, config)
    if new:
        config.base_model_name_or_path = str(model_id)
        model = get_peft_model(inner, config, adapter_name=adapter_name, low_cpu_mem_usage=True)
    else:
        model = PeftModel.from_pretrained(
            inner,
            str(adapter),
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            low_cpu_mem_usage=True,
            torch_device=str(device),
        )
    layers = adapter_layers(inner, adapter_name)[1]
    of_layers = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "bias")}
    weights.load(inner, [name for name in weights.names if name not in of_layers and _is_first(weights, inner, name)])
    others = []
    if not new:
        warn_if_trained(layers.values(), adapter_name, config)
    for name, layer in progress_bar(layers.items(), desc="loading and packing"):
        own = [f"{name}.weight", f"{name}.bias"]
        weights.load(
            inner, [part for part in own if part in weights.names and _is_first(weights, inner, part)], device
        )
        if new:
            initialise_layer(model, adapter_name, name, layer)
        else:
            check_target(name, layer)
            if not layer.record(adapter_name).fits(layer.base_record()):
                others.append(name)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.frozen.pack(adapter_name, config.storage)
    _tie(weights, inner)
    for module in inner.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _fill(module.modules_to_save[adapter_name], module.original_module)
    if others:
        warnings.warn(
            f"{len(others)} of {len(layers)} weights of {str(model_id)!r}, such as {others[0]}, are not those that "
            "the adapter was trained on, or they are in another dtype: its codes are others here.",
            OtherBaseWarning,
            stacklevel=2,
        )
    if new:
        say(str(summarize(model, adapter_name)))
    return model.to(device)


def _is_first(weights: Checkpoint, model: nn.Module, name: str) -> bool:
    """Whether a tensor is to be read: neither tied to one before it, nor brought by the adapter, as biases can be."""
    module, leaf = holder(model, name)
    parameter = module._parameters.get(leaf)
    return weights.first[name] == name and (parameter is None or parameter.is_meta)


def _tie(weights: Checkpoint, model: nn.Module) -> None:
    for name, first in weights.first.items():
        (module, leaf), (other, of_other) = holder(model, name), holder(model, first)
        if name != first and leaf in module._parameters:
            module._parameters[leaf] = other._parameters[of_other]


def _fill(copied: nn.Module, original: nn.Module) -> None:
    """Give a module that trains in full its start, where no saved adapter brought one."""
    values = original.state_dict()
    for name, parameter in list(copied.named_parameters()):
        if parameter.is_meta:
            module, leaf = holder(copied, name)
            module._parameters[leaf] = nn.Parameter(values[name].clone(), requires_grad=parameter.requires_grad)
