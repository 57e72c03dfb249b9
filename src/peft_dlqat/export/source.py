"""What is exported: a model's tensors one after the other, adapted weights as codes, from memory or from disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapter_file import recorded_dtype
from ..config import DLQATConfig
from ..formats import Outline, TensorInfo
from ..large.checkpoint import Checkpoint, empty_model, weights_folder
from ..layer import DLQATLayer, adapter_layers
from ..quant.quantizer import QuantizedWeight

T = TypeVar("T")


class Source:
    """The tensors of a base model with one adapter.

    Attributes:
        adapter_name: the adapter.
        adapter: its config.
        config: the base model's config, its embeddings untied where the adapter has changed one of the two.
        tensors: all tensors, in the order of the model's state dict; of tied ones the first.
        base: folder or hub id of the base model; "" where it has none.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None, checkpoint: Checkpoint | None = None) -> None:
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
        self.adapter: DLQATConfig = getattr(model, "peft_config")[self.adapter_name]  # noqa: B009  mypy sees a tensor
        self.base = str(inner.name_or_path or "")
        self._checkpoint = checkpoint
        self._keys: dict[str, str] = {}
        self.tensors = self._find_tensors()
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
        )

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return [tensor.name for tensor in self.tensors]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model."""
        return self.model.dtype

    @property
    def linears(self) -> list[str]:
        """All linear layers of the base model, the output head included."""
        found = (
            _plain_name(f"{n}.weight", self.model, self.adapter_name)
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
    def untrained(self) -> bool:
        """Whether the adapter is as it was made: B (or QA-LoRA's) zero, and m one."""
        return not any(layer.moved(self.adapter_name) for layer in self.layers.values())

    @property
    def on_other_weights(self) -> list[str]:
        """The layers whose W0 is not the one that the adapter was trained on, as far as its records tell."""
        return [path for path in self.layers if not self._with_weight(path, self._on_own_weight)]

    def _on_own_weight(self, layer: DLQATLayer) -> bool:
        return layer.record(self.adapter_name).fits(layer.base_record())

    @property
    def embedding(self) -> str:
        """The name of the token embedding's weight."""
        found = self.model.get_input_embeddings()
        inside = getattr(found, "original_module", found)
        name = next((name for name, module in self.model.named_modules() if module in (found, inside)), "")
        return f"{name}.weight"

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[TensorInfo, torch.Tensor | QuantizedWeight]]:
        """The tensors, or some of them, in the order of `tensors`; each is in memory while it is the current one."""
        wanted = None if names is None else set(names)
        for tensor in self.tensors:
            if wanted is None or tensor.name in wanted:
                yield tensor, self._value(tensor)

    def on_disk(self, key: str, dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor that the model has on the meta device, from the base model's files; None for what it does not use.

        Args:
            key: the tensor's name in the model's state dict.
            dtype: the one to have it in.
        """
        name = _plain_name(key, self.model, self.adapter_name)
        if name is None or self._checkpoint is None:
            return None
        return self._checkpoint.read(name).to(dtype)

    @torch.no_grad()
    def _value(self, info: TensorInfo) -> torch.Tensor | QuantizedWeight:
        if info.grid is not None:
            return self._with_weight(info.module, lambda layer: _on_cpu(layer.quantized_weight(self.adapter_name)))
        tensor = _resolve(self.model, self._keys[info.name])
        if tensor.is_meta:
            assert self._checkpoint is not None
            return self._checkpoint.read(info.name).to(tensor.dtype)
        return tensor.detach().cpu()

    def _with_weight(self, path: str, function: Callable[[DLQATLayer], T]) -> T:
        """Call a function of a layer while its original weight is in memory."""
        layer = self.layers[path]
        if not layer.frozen.as_kept().is_meta:
            return function(layer)
        assert self._checkpoint is not None
        self._checkpoint.load(self.model, [f"{path}.weight"])
        try:
            return function(layer)
        finally:
            self._checkpoint.release(self.model, [f"{path}.weight"])

    def _find_tensors(self) -> list[TensorInfo]:
        tensors, seen = [], set()
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            name = _plain_name(key, self.model, self.adapter_name)
            if name is None:
                continue
            layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if layer is None and id(tensor) in seen:
                continue  # tied to one that is there already
            seen.add(id(tensor))
            self._keys[name] = key
            grid = None if layer is None else layer.specs[self.adapter_name].grid
            module = self.model.get_submodule(key.rpartition(".")[0])
            conv1d = isinstance(module.get_base_layer() if isinstance(module, DLQATLayer) else module, Conv1D)
            transposed = conv1d and name.endswith(".weight")
            shape, dtype = tuple(tensor.shape), tensor.dtype
            if layer is not None:  # whose weight may be packed
                shape, dtype = (layer.out_features, layer.in_features), layer.frozen.dtype
                shape = shape[::-1] if transposed else shape
            tensors.append(TensorInfo(name, shape, dtype, grid, transposed))
        return tensors

    def _still_tied(self) -> bool:
        return f"{self.head}.weight" not in self.names


def open_source(
    model_or_adapter: nn.Module | str | Path,
    base: str | Path | None,
    adapter_name: str | None,
) -> Source:
    """The source of a live model, or of an adapter's folder or hub id and its base model on disk."""
    if isinstance(model_or_adapter, nn.Module):
        if base is not None:
            raise ValueError(f"base={str(base)!r} goes with an adapter on disk; a model has its base in it.")
        return Source(model_or_adapter, adapter_name)
    adapter = str(model_or_adapter)
    config = DLQATConfig.from_pretrained(adapter)
    if not isinstance(config, DLQATConfig):
        raise ValueError(f"{adapter} holds a {config.peft_type} adapter; only DL-QAT adapters can be exported.")
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say its base model; name its folder or hub id by base=...")
    folder = weights_folder(base, config.revision)
    model_config = AutoConfig.from_pretrained(folder)
    skeleton = empty_model(model_config, recorded_dtype(adapter))
    skeleton.name_or_path = str(base)
    checkpoint = Checkpoint(folder, skeleton)
    model = PeftModel.from_pretrained(skeleton, adapter, adapter_name="default", low_cpu_mem_usage=True).eval()
    return Source(model, "default", checkpoint)


def _plain_name(key: str, model: nn.Module, adapter_name: str) -> str | None:
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


def _resolve(model: nn.Module, key: str) -> torch.Tensor:
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, DLQATLayer):
        module = module.get_base_layer()
    return getattr(module, leaf)


def _on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    zero = None if weight.zero is None else weight.zero.cpu()
    return QuantizedWeight(weight.codes.cpu(), weight.scale.cpu(), zero, weight.grid)
