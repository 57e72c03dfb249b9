"""A model on disk of which some weights are in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .layer import DLQATLayer

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


def weights_folder(model_id: str | Path, revision: str | None = None) -> Path:
    """The folder that holds a model's config and safetensors: itself, or where a hub id was downloaded to."""
    folder = Path(model_id)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(str(model_id), revision=revision, allow_patterns=list(WEIGHT_FILES)))


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


class Checkpoint:
    """A checkpoint's tensors, loaded into a model on the meta device and released again.

    `names` are those of the model's tensors, before any adapter was injected, in the order of its state dict.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        files = {"model.safetensors"}
        if index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing_files = sorted(name for name in files if not (folder / name).is_file())
        if missing_files:
            raise FileNotFoundError(
                f"{folder} has no {missing_files[0]}; save the model with save_pretrained(), which writes safetensors."
            )
        shapes: dict[str, list[int]] = {}
        self._file: dict[str, Path] = {}
        for file in sorted(files):
            with safe_open(folder / file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  it is no dict
                    entry = tensors.get_slice(key)
                    # Codes of a quantized checkpoint are no weights.
                    if entry.get_dtype() in ("F64", "F32", "F16", "BF16"):
                        self._file[key], shapes[key] = folder / file, entry.get_shape()
        state = model.state_dict(keep_vars=True)
        self.names = list(state)
        self._key = {name: _key(name, state, shapes, model.base_model_prefix) for name in state}
        missing = sorted(name for name, key in self._key.items() if key is None)
        if missing:
            raise ValueError(
                f"the files in {folder} lack {len(missing)} of the model's {len(state)} floating-point tensors, or "
                f"have them in another shape: {', '.join(missing[:5])}. Load the model with from_pretrained(), which "
                "may rename or convert them, and save it with save_pretrained(); weights that are quantized already "
                "cannot be used."
            )

    def load(self, model: nn.Module, names: list[str]) -> None:
        """Read tensors into a model, in the dtype that it has them in."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file[self._key[name]], []).append(name)  # type: ignore[index]
        for file, own in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for name in own:
                    replace_tensor(model, name, lambda old, key=self._key[name]: tensors.get_tensor(key).to(old.dtype))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as the file has it."""
        key = self._key[name]
        assert key is not None
        with safe_open(self._file[key], framework="pt") as tensors:
            return tensors.get_tensor(key)

    def release(self, model: nn.Module, names: list[str]) -> None:
        """Put tensors back to the meta device."""
        for name in names:
            replace_tensor(model, name, lambda old: old.to("meta"))


def _key(name: str, state: dict[str, Any], shapes: dict[str, list[int]], prefix: str) -> str | None:
    """A tensor's key in the checkpoint: its own, with or without the model's prefix, or that of one tied to it."""
    tied = [other for other, tensor in state.items() if tensor is state[name] and other != name]
    for known in (name, *tied):
        for key in (known, known.removeprefix(f"{prefix}."), f"{prefix}.{known}"):
            if shapes.get(key) == list(state[name].shape):
                return key
    return None


def replace_tensor(model: nn.Module, name: str, new: Any) -> None:
    """Put new(old) in the place of a base tensor, that may have moved into an adapter layer."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if isinstance(module, DLQATLayer):
        module = module.get_base_layer()
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(new(module._parameters[leaf].data), requires_grad=False)
    else:
        module._buffers[leaf] = new(module._buffers[leaf])
