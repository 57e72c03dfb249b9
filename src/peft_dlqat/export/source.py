"""What is exported: a model's tensors one after the other, adapted weights as codes, from memory or from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from ..adapter_file import recorded_dtype
from ..config import DLQATConfig
from ..contents import Contents, plain_name, resolve
from ..file_layers import in_file
from ..formats import TensorInfo
from ..large.checkpoint import Checkpoint, empty_model, weights_folder
from ..large.load_quantized import is_quantized, load_quantized
from ..layer import DLQATLayer
from ..model import check_what_was_loaded
from ..quant.fixed_point import IN_FILE
from ..quant.quantizer import QuantizedWeight

T = TypeVar("T")


class Source(Contents):
    """What is exported, to be read tensor by tensor.

    Attributes:
        adapter: the adapter's config.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None, checkpoint: Checkpoint | None = None) -> None:
        check_what_was_loaded(model)
        super().__init__(model, adapter_name)
        self.adapter: DLQATConfig = getattr(model, "peft_config")[self.adapter_name]  # noqa: B009  mypy sees a tensor
        self._checkpoint = checkpoint

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

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[TensorInfo, torch.Tensor | QuantizedWeight]]:
        """The tensors, or some of them, in the order of `tensors`; each is in memory while it is the current one."""
        wanted = None if names is None else set(names)
        for tensor in self.tensors:
            if wanted is None or tensor.name in wanted:
                yield tensor, self._value(tensor)

    def dense(self) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """Tensors without codes, one at a time from the disk where they lie there, decoded where a file has codes."""
        for tensor, value in self.read([tensor.name for tensor in self.tensors if tensor.grid is None]):
            assert isinstance(value, torch.Tensor)
            yield tensor, value

    def originals(self) -> Iterator[tuple[TensorInfo, torch.Tensor, bool]]:
        """All tensors as the base model has them, outputs as rows: adapted weights before training.

        The bool says whether it is the very tensor, neither trained beside the adapter nor packed.
        """
        for tensor in self.tensors:
            if tensor.grid is not None:
                packed = self.layers[tensor.module].frozen.packed
                yield tensor, self._with_weight(tensor.module, _original), not packed
                continue
            value = self._value(tensor)
            assert isinstance(value, torch.Tensor)
            saved = any(tensor.name.startswith(f"{module}.") for module in self.modules_to_save)
            trained = saved or (self.adapter.bias != "none" and tensor.name.endswith(".bias"))
            yield tensor, value.t() if tensor.transposed else value, not trained

    def on_disk(self, key: str, dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor that the model has on the meta device, from the base model's files; None for what it does not use.

        Args:
            key: the tensor's name in the model's state dict.
            dtype: the one to have it in.
        """
        name = plain_name(key, self.model, self.adapter_name)
        if name is None or self._checkpoint is None:
            return None
        return self._checkpoint.read(name, dtype)

    @torch.no_grad()
    def _value(self, info: TensorInfo) -> torch.Tensor | QuantizedWeight:
        if info.grid is not None:
            return self._with_weight(info.module, lambda layer: _on_cpu(layer.quantized_weight(self.adapter_name)))
        module: Any = self.model.get_submodule(self._keys[info.name].rpartition(".")[0])
        tensor = resolve(self.model, self._keys[info.name])
        if in_file(module) and tensor is module.kept:
            return module.decoded(tensor.detach()).cpu()
        if tensor.is_meta:
            assert self._checkpoint is not None
            return self._checkpoint.read(info.name, tensor.dtype)
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
    if config.storage == IN_FILE:  # `base` is the file, or what says its config
        is_file = base is not None and is_quantized(base)
        file = base if is_file else config.base_model_name_or_path
        if file is not None:
            return Source(load_quantized(file, adapter, None if is_file else base)[0], "default")
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say its base model; name its folder or hub id by base=...")
    folder = weights_folder(base, config.revision)
    model_config = AutoConfig.from_pretrained(folder)
    skeleton = empty_model(model_config, recorded_dtype(adapter))
    skeleton.name_or_path = str(base)
    checkpoint = Checkpoint(folder, skeleton, config)
    model = PeftModel.from_pretrained(skeleton, adapter, adapter_name="default", low_cpu_mem_usage=True).eval()
    return Source(model, "default", checkpoint)


def _original(layer: DLQATLayer) -> torch.Tensor:
    return layer.frozen.original().detach().cpu()


def _on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    zero = None if weight.zero is None else weight.zero.cpu()
    blocks = None if weight.blocks is None else weight.blocks.cpu()
    return QuantizedWeight(weight.codes.cpu(), weight.scale.cpu(), zero, weight.grid, blocks)
