"""What a model with one adapter holds: its tensors by the names of the base model, in memory or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .file_layers import in_file
from .formats import Outline, TensorInfo
from .formats.origin import Origin
from .layer import DLQATLayer, adapter_layers
from .placement import full_shape

# An attribute of a module: what was done to its weight before it was adapted, in words, see `base_weights`.
CHANGED = "_dlqat_changed"


class Contents:
    """The tensors of a transformers model with one adapter.

    Attributes:
        adapter_name: the adapter.
        layers: its layers, by the names of the base model.
        model: the base model, with the adapter's layers in it.
        config: the base model's config, its embeddings untied where the adapter has changed one of the two.
        tensors: all tensors, in the order of the model's state dict; of tied ones the first.
        base: folder or hub id of the base model; "" where it has none.
        origin: the quantized file that it was opened from, if any.
        modules_to_save: modules that the adapter trains in full.

    Raises:
        TypeError: for a model that is none of transformers'.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        self.adapter_name, self.layers = adapter_layers(model, adapter_name)
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(inner, PreTrainedModel):
            raise TypeError(
                f"the base model is a {type(inner).__name__}, no transformers model; only models that transformers "
                "can load again are exported."
            )
        self.model = inner
        if isinstance(model, PeftModel):  # names without PEFT's prefix
            _, self.layers = adapter_layers(inner, self.adapter_name)
        self.base = str(inner.name_or_path or "")
        self.origin: Origin | None = getattr(inner, "origin", None)
        found = tensors_of(inner, self.adapter_name, self.layers)
        self._keys = {tensor.name: key for key, tensor in found.items()}
        self.tensors = list(found.values())
        self.config: PretrainedConfig = copy.deepcopy(inner.config)
        self.config.architectures = [type(inner).__name__]
        self.modules_to_save = sorted(
            name for name, module in inner.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
        )
        if getattr(self.config, "tie_word_embeddings", False) and not self._still_tied():
            self.config.tie_word_embeddings = False

    def outline(self, dtype: torch.dtype, embeddings: str, max_shard_size: int) -> Outline:
        """What is to be written, for the format; the arguments are those of `Outline`."""
        config = copy.deepcopy(self.config)
        config.dtype = dtype
        return Outline(
            name=Path(self.base).name,
            config=config,
            tensors=tuple(self.tensors),
            linears=self.linears,
            embedding=self.embedding,
            head=self.head,
            dtype=dtype,
            embeddings=embeddings,
            max_shard_size=max_shard_size,
            origin=self.origin,
        )

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return [tensor.name for tensor in self.tensors]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model."""
        return self.model.dtype

    def dense(self) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """Tensors without codes, as the model has them: on their devices, or the meta device.

        Not those that lie in memory as a quantized file has them.
        """
        for tensor in self.tensors:
            if tensor.grid is None and not self._is_in_file(tensor):
                yield tensor, resolve(self.model, self._keys[tensor.name]).detach()

    def _is_in_file(self, tensor: TensorInfo) -> bool:
        path, _, leaf = self._keys[tensor.name].rpartition(".")
        return leaf == "weight" and in_file(self.model.get_submodule(path))

    @property
    def linears(self) -> list[str]:
        """All linear layers of the base model, the output head included."""
        found = (
            plain_name(f"{n}.weight", self.model, self.adapter_name)
            for n, m in self.model.named_modules()
            if isinstance(m, nn.Linear)
        )
        return sorted({name.removesuffix(".weight") for name in found if name is not None})

    @property
    def untouched_linears(self) -> list[str]:
        """Linear layers without the adapter, which stay dense; the output head is not counted."""
        return [name for name in self.linears if name not in self.layers and name != self.head]

    @property
    def head(self) -> str:
        """The output head's name; "" where the model has none."""
        head = self.model.get_output_embeddings()
        inside = getattr(head, "original_module", head)
        return next((name for name, module in self.model.named_modules() if module in (head, inside)), "")

    @property
    def embedding(self) -> str:
        """The name of the token embedding's weight."""
        found = self.model.get_input_embeddings()
        inside = getattr(found, "original_module", found)
        name = next((name for name, module in self.model.named_modules() if module in (found, inside)), "")
        return f"{name}.weight"

    def _still_tied(self) -> bool:
        return f"{self.head}.weight" not in self.names


def tensors_of(model: nn.Module, adapter_name: str, layers: dict[str, DLQATLayer]) -> dict[str, TensorInfo]:
    """All tensors of a base model with an adapter, by their keys in its state dict; of tied ones the first.

    Args:
        model: the base model, with the adapter's layers in it.
        adapter_name: the adapter.
        layers: its layers, by the names of the base model.
    """
    tensors, seen = {}, set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = plain_name(key, model, adapter_name)
        if name is None or not isinstance(tensor, torch.Tensor):
            continue
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None and id(tensor) in seen:
            continue  # tied to one that is there already
        seen.add(id(tensor))
        grid = None if layer is None else layer.specs[adapter_name].grid
        module = model.get_submodule(key.rpartition(".")[0])
        conv1d = isinstance(module.get_base_layer() if isinstance(module, DLQATLayer) else module, Conv1D)
        transposed = conv1d and name.endswith(".weight")
        shape, dtype = full_shape(tensor), tensor.dtype
        if in_file(module) and name.endswith(".weight"):
            shape, dtype = module.shape, module.dtype  # type: ignore[assignment]
        if layer is not None:  # whose weight may be packed
            shape, dtype = (layer.out_features, layer.in_features), layer.frozen.dtype
            shape = shape[::-1] if transposed else shape
        tensors[key] = TensorInfo(name, shape, dtype, grid, transposed)
    return tensors


def resolve(model: nn.Module, key: str) -> torch.Tensor:
    """A tensor by its key in the state dict; of an adapter's layer the base layer's own."""
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, DLQATLayer):
        module = module.get_base_layer()
    return module.kept if in_file(module) and leaf == "weight" else getattr(module, leaf)  # type: ignore[return-value]


def plain_name(key: str, model: nn.Module, adapter_name: str) -> str | None:
    """A state dict's key without wrappers; None for what is not exported: adapters, and copies that are not used."""
    if ".dlqat_" in key:
        return None
    parts = key.split(".")
    for index in range(len(parts)):
        module: Any = model.get_submodule(".".join(parts[:index])) if index else model
        if isinstance(module, AuxiliaryTrainingWrapper):
            trained = adapter_name in module.modules_to_save  # type: ignore[attr-defined]
            used = ["modules_to_save", adapter_name] if trained else ["original_module"]
            if parts[index : index + len(used)] != used:
                return None
            return ".".join(parts[:index] + parts[index + len(used) :])
        if isinstance(module, DLQATLayer):
            return ".".join(part for part in parts if part != "base_layer")
        if index + 1 == len(parts):
            break
    return key
