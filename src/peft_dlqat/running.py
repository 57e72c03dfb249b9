"""How a model is run here: in eval mode, as its own base model, without a cache that only generation needs."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .layer import DLQATLayer


def unwrapped(model: nn.Module) -> Any:
    """The model that DDP or DataParallel wraps: they hand on neither its config nor its methods."""
    return model.module if isinstance(model, DistributedDataParallel | DataParallel) else model


def base_model(model: nn.Module) -> Any:
    """The model itself, without what PEFT has wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether its decoder takes its inputs from the labels, and each of its two stacks of layers has its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def predicts_next(model: nn.Module) -> bool:
    """Whether its labels [batch, length] are of the next position, as a causal language model's, or of its own."""
    of_its_own = type(base_model(unwrapped(model))).__name__.endswith(("ForTokenClassification", "ForMaskedLM"))
    return not of_its_own and not is_encoder_decoder(model)  # whose decoder gets the labels shifted


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What the model returns for a batch of its keyword arguments; it keeps no keys and values for generation.

    They would take twice the hidden size a token and layer, and models keep them unless told otherwise.
    """
    if "use_cache" in inspect.signature(base_model(model).forward).parameters:
        batch = {**batch, "use_cache": False}
    return model(**batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside the block; every module has its own mode (train or eval) back after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the untouched base model inside the block, on any model with adapters, wrapped or injected.

    Unlike PEFT's `disable_adapter`, this leaves every parameter's `requires_grad` as it is, and what was merged is
    merged after the block too: the very tensors are put back. Biases that train do so in the base model itself, and
    stay as they are.

    Args:
        model: a model with adapters, merged or not.
    """
    switches = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [module._disable_adapters for module in switches]
    with ExitStack() as stack:
        # A merged layer whose adapters are switched off would unmerge itself for good.
        for layer in model.modules():
            if isinstance(layer, DLQATLayer) and layer.merged:
                stack.enter_context(layer.unmerged())
        for module in switches:
            module._disable_adapters = True
        try:
            yield
        finally:
            for module, disabled in zip(switches, before, strict=True):
                module._disable_adapters = disabled


@torch.no_grad()
def teacher_logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of the base model in full precision, without dropout.

    Args:
        model: a model with adapters, merged or not; it is left as it was.
        batch: keyword arguments of its forward; `labels` are left out, except where a decoder takes its inputs from
            them.

    Returns:
        Logits, [batch, length, vocabulary] for a language model.

    Raises:
        ValueError: for a model without logits.
    """
    with evaluating(model), adapters_disabled(model):
        return logits_of(model, batch)


def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The model's own logits, as `teacher_logits` gives the base model's."""
    left_out = () if is_encoder_decoder(model) else ("labels",)
    output = forward(model, {key: value for key, value in batch.items() if key not in left_out})
    if getattr(output, "logits", None) is None:
        raise ValueError(f"the model returns a {type(output).__name__} without logits; use objective='task' for it.")
    return output.logits


def gives_distribution(model: nn.Module) -> bool:
    """Whether its logits are those of one of several classes or tokens: no regression, not several labels at once."""
    base = base_model(unwrapped(model))
    config = getattr(base, "config", None)
    of_classes = getattr(config, "num_labels", None) != 1 and getattr(config, "problem_type", None) not in (
        "regression",
        "multi_label_classification",
    )
    return of_classes or not type(base).__name__.endswith("Classification")


def trained_base_parameters(model: nn.Module) -> list[str]:
    """Names of the base model's own parameters that take gradients: trained in place, so the base model drifts."""
    own = adapter_parameters(model)
    return [name for name, tensor in model.named_parameters() if tensor.requires_grad and id(tensor) not in own]


def adapter_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that adapters of any kind, and PEFT's copies of modules to save, have brought along."""
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for attribute in (*module.adapter_layer_names, *module.other_param_names):
                value = getattr(module, attribute, None)
                if isinstance(value, nn.Module):
                    own.update(id(parameter) for parameter in value.parameters())
    return own


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on the model's device.

    Raises:
        ValueError: if it is no dict.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a calibration batch is a {type(batch).__name__}, but must be a dict of the model's arguments, such as "
            "{'input_ids': ..., 'labels': ...}."
        )
    return send_to_device(dict(batch), device)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Training after calibration draws the same random numbers as training without: a resumed run relies on it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def dlqat_layers(model: nn.Module) -> list[DLQATLayer]:
    """All layers with DL-QAT adapters; none for a model without."""
    return [module for module in model.modules() if isinstance(module, DLQATLayer)]


@contextmanager
def temporarily_merged(model: nn.Module) -> Iterator[None]:
    """Merge the active adapters inside the block, and put the very tensors back after it.

    Layers that are merged already, or whose adapters are switched off, are left as they are. The merged weights take
    the memory of the adapted layers a second time.

    Args:
        model: any model; one without DL-QAT adapters is left alone.
    """
    merged: list[DLQATLayer] = []
    try:
        for layer in dlqat_layers(model):
            if not layer.merged and not layer.disable_adapters:
                layer.merge()
                if layer.merged:  # a layer without an active adapter stays as it is
                    merged.append(layer)
        yield
    finally:
        for layer in merged:
            layer.unmerge()
