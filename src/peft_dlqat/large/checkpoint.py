"""A causal language model whose weights stay in its files: a skeleton on the meta device, filled tensor by tensor."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from ..base_weights import BaseChanges
from ..config import DLQATConfig
from ..formats.safetensors_folder import OTHER_WEIGHTS, weight_files
from ..layer import DLQATLayer
from ..targets import check_target

_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]


def weights_folder(model_id: str | Path, revision: str | None = None, patterns: list[str] | None = _FILES) -> Path:
    """The folder that holds a model's config and safetensors: itself, or where a hub id was downloaded to.

    Args:
        model_id: the folder, or the hub id.
        revision: of the hub id.
        patterns: files that are downloaded; None for all but weights of other kinds.

    Raises:
        FileNotFoundError: for what can only be a path, and is no folder.
    """
    folder = Path(model_id)
    if folder.is_dir():
        return folder
    if isinstance(model_id, Path) or folder.is_absolute() or len(folder.parts) > 2 or model_id.startswith("."):
        raise FileNotFoundError(f"there is no folder {str(model_id)!r}; give a model's folder or hub id.")
    which: dict[str, Any] = {"allow_patterns": patterns} if patterns else {"ignore_patterns": list(OTHER_WEIGHTS)}
    return Path(snapshot_download(str(model_id), revision=revision, **which))


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype | None = None, cls: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """A model with its parameters on the meta device and its buffers real, weights tied; draws no random numbers.

    Args:
        config: the model's config.
        dtype: dtype of the parameters; defaults to the one that the config names.
        cls: class of the model; the config's causal language model by default.
    """
    make = AutoModelForCausalLM.from_config if cls is None else cls._from_config
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), init_empty_weights(include_buffers=False):
        model = make(config, dtype=dtype or config.dtype or torch.float32)
    model.tie_weights()
    return model


def skeleton(folder: Path, model_id: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The empty model of a folder, in eval mode, with its generation config.

    Args:
        folder: with the model's config.json.
        model_id: what an adapter's config will name as its base.
        dtype: of the parameters; defaults to the one that the model's config names.
    """
    model = empty_model(AutoConfig.from_pretrained(folder), dtype)
    model.name_or_path = model_id
    with suppress(OSError):  # has none
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


class Checkpoint:
    """A checkpoint's tensors, loaded into a model on the meta device and released again.

    `names` are those of the model's tensors, before any adapter was injected, in the order of its state dict.

    Args:
        folder: with model.safetensors, or with shards and their index.
        model: the empty model, without adapters.
        config: of the adapter that the weights are read for, which may change them.

    Raises:
        FileNotFoundError: if the model is not stored as safetensors.
        ValueError: if a tensor of the model is not in the files, or a file is damaged.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, config: DLQATConfig) -> None:
        files = set(weight_files(folder).values())
        shapes: dict[str, list[int]] = {}
        self._file: dict[str, Path] = {}
        for file in sorted(files):
            for key, shape in _float_tensors(folder / file).items():
                self._file[key], shapes[key] = folder / file, shape
        self._changes = BaseChanges(config, model)
        state = model.state_dict(keep_vars=True)
        self.names = list(state)
        # By name, the first of those that are tied to it.
        self.first = {name: next(other for other in state if state[other] is state[name]) for name in state}
        self._key = {name: _key(name, state, shapes, model.base_model_prefix) for name in state}
        missing = sorted(name for name, key in self._key.items() if key is None)
        if missing:
            raise ValueError(
                f"the files in {folder} lack {len(missing)} of the model's {len(state)} floating-point tensors, or "
                f"have them in another shape: {', '.join(missing[:5])}. Load the model with from_pretrained(), which "
                "may rename or convert them, and save it with save_pretrained(); for weights that are quantized "
                "already use load_quantized."
            )

    def load(self, model: nn.Module, names: list[str], device: torch.device | str = "cpu") -> None:
        """Read tensors into a model, in the dtype that it has them in."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file[self._key[name]], []).append(name)  # type: ignore[index]
        for file, own in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for name in own:
                    # A copy: what is read otherwise stays a part of the file, that another process may write.
                    replace_tensor(
                        model,
                        name,
                        lambda old, name=name: self._changes.of(
                            name, tensors.get_tensor(self._key[name]).to(device, old.dtype, copy=True)
                        ),
                    )

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor, in the dtype that the model has it in."""
        key = self._key[name]
        assert key is not None
        with safe_open(self._file[key], framework="pt") as tensors:
            return self._changes.of(name, tensors.get_tensor(key).to(dtype))

    def release(self, model: nn.Module, names: list[str]) -> None:
        """Put tensors back to the meta device."""
        for name in names:
            replace_tensor(model, name, lambda old: old.to("meta"))


def _float_tensors(file: Path) -> dict[str, list[int]]:
    """Shapes of a file's tensors, but for codes: those of a quantized checkpoint are no weights.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            entries = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  it is no dict
            floating = ("F64", "F32", "F16", "BF16")
            return {key: entry.get_shape() for key, entry in entries.items() if entry.get_dtype() in floating}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({str(error)[:300]}); copy or download it again.") from error


def initialise_layer(model: Any, adapter_name: str, name: str, layer: DLQATLayer) -> None:
    """Make a layer's adapter anew, now that its weight is there, as injection does: same order, same draws.

    Args:
        model: the model as PEFT wraps it.
        adapter_name: the adapter.
        name: the layer's module name in the base model.
        layer: the layer.

    Raises:
        ValueError: if the weight is not finite.
    """
    check_target(name, layer)
    model.base_model._create_and_replace(
        model.peft_config[adapter_name], adapter_name, layer, "", layer, current_key=name
    )


def holder(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module that holds a base tensor now, whatever PEFT has wrapped around it, and the tensor's own name."""
    *path, leaf = name.split(".")
    module: Any = model
    for part in (*path, None):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        if isinstance(module, DLQATLayer):
            module = module.get_base_layer()
        if part is not None:
            module = module.get_submodule(part)
    return module, leaf


def _key(name: str, state: dict[str, Any], shapes: dict[str, list[int]], prefix: str) -> str | None:
    """A tensor's key in the checkpoint: its own, with or without the model's prefix, or that of one tied to it."""
    tied = [other for other, tensor in state.items() if tensor is state[name] and other != name]
    for known in (name, *tied):
        for key in (known, known.removeprefix(f"{prefix}."), f"{prefix}.{known}"):
            if shapes.get(key) == list(state[name].shape):
                return key
    return None


def replace_tensor(model: nn.Module, name: str, new: Any) -> None:
    """Put new(old) in the place of a base tensor."""
    module, leaf = holder(model, name)
    old = module._parameters.get(leaf)
    if old is not None:
        module._parameters[leaf] = nn.Parameter(new(old.data), requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = new(module._buffers[leaf])
