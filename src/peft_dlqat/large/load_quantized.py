"""From a quantized file to a model that trains inside the file's own blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig

from ..config import DLQATConfig
from ..file_layers import FileLinear
from ..quant.fixed_point import IN_FILE
from ..quant.ggml import GGML_TYPES
from .checkpoint import empty_model, weights_folder
from .folder_model import OF_GPTQ, FolderModel, is_of_a_layout
from .gguf_model import GGUFModel
from .quantized_file import QuantizedFile


def load_quantized(
    path: str | Path,
    adapter: DLQATConfig | str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    adapter_name: str = "default",
    is_trainable: bool = False,
    allow_frozen: bool = True,
) -> tuple[PeftModel, Any]:
    """Open a quantized model and put an adapter into it, that trains inside the very blocks of its files.

    The weights stay as the file has them, 2 to 8 bits each. The file's types are the grids, its scales and zeros the
    adapter's s and z, and its codes the start: an untrained adapter computes what the file says, to the bit.
    `export_model(model, out, FORMAT)`, with the file's own format, writes the file again, with the trained weights in
    the places of the old ones; of a folder all other files are copied.

    Of GGUF, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are trained. Weights of other types are decoded and stay
    frozen. Of GPTQ, both versions are opened, but no order of inputs (desc_act=True); of AWQ, version "gemm"; of
    compressed-tensors, "pack-quantized" weights, with nothing else rounded; of MLX, mode "affine".

    Args:
        path: a GGUF file; or the folder or hub id of a model in one of the other formats, with config.json and
            safetensors files.
        adapter: a config, for a new adapter, without bits, group_size, zero_point and scale_dtype, which are the
            file's; or the folder or hub id of a saved adapter that was trained on this very file.
        base: for a GGUF file, folder or hub id of the base model's config and tokenizer, where transformers does not
            read them from the file.
        dtype: of the computation, and of the weights that have no codes; defaults to the one that the config names.
        device: where the weights go.
        adapter_name: name of the adapter.
        is_trainable: whether a saved adapter is to be trained on; a new one always is.
        allow_frozen: whether weights of other quantized types (IQ4_XS, MXFP4, ...) may be decoded and stay frozen;
            else a file that has some is refused.

    Returns:
        The model as PEFT wraps it, in eval mode, and its tokenizer.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: for a file that is damaged, or whose tensors are not the config's; quantization that cannot be
            opened; a config that names a grid; an adapter that was trained on another file.

    Example:
        ```py
        >>> model, tokenizer = load_quantized("model.Q4_K_M.gguf", DLQATConfig(r=16, task_type="CAUSAL_LM"))
        ```
    """
    file = open_quantized(path, base)
    if (others := file.frozen_types) and not allow_frozen:
        raise ValueError(
            f"{path} has tensors of types that are not trained ({others}), and allow_frozen=False; use another file "
            f"of the model, with {', '.join(GGML_TYPES)}."
        )
    config = _config(adapter)
    inner = empty_model(file.read_config(), dtype)
    inner.name_or_path = str(path)
    tokenizer = file.read_tokenizer()
    sha256 = file.sha256()
    if not isinstance(adapter, DLQATConfig) and config.file_sha256 != sha256:
        raise ValueError(
            f"adapter={str(adapter)!r} belongs to another file than {path}: its sha256 is {config.file_sha256}, and "
            f"this one's {sha256}; open {config.base_model_name_or_path!r}, or train an adapter on this file."
        )
    inner.origin = file.fill(sha256, inner, inner.dtype, device)  # type: ignore[assignment]
    inner.eval().to(device)
    if isinstance(adapter, DLQATConfig):
        config.base_model_name_or_path, config.file_sha256 = str(path), sha256
        model = get_peft_model(inner, config, adapter_name=adapter_name)
    else:
        model = PeftModel.from_pretrained(inner, str(adapter), adapter_name=adapter_name, is_trainable=is_trainable)
    head: Any = inner.get_output_embeddings()
    if isinstance(head, FileLinear):
        head.read_by_others = True
    return model.eval(), tokenizer


def open_quantized(path: str | Path, base: str | Path | None = None) -> QuantizedFile:
    """Read the header of a quantized file, or the headers of a folder's; arguments as `load_quantized`.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: for what is damaged, or cannot be opened.
    """
    if _is_file(path):
        return GGUFModel(path, base)
    if base is not None:
        raise ValueError(
            f"base={str(base)!r} has no meaning for {path}, whose folder has its own config; leave it out."
        )
    return FolderModel(weights_folder(path, patterns=None))


def is_quantized(path: str | Path) -> bool:
    """Whether a path or hub id is of what `load_quantized` is for; False where that cannot be told."""
    if _is_file(path):
        return True
    if (Path(path) / OF_GPTQ).is_file():
        return True
    try:
        return is_of_a_layout(PretrainedConfig.get_config_dict(str(path))[0])
    except (OSError, ValueError):
        return False


def _is_file(path: str | Path) -> bool:
    return Path(path).is_file() or str(path).endswith(".gguf")


def in_file_config(config: DLQATConfig) -> DLQATConfig:
    """A user's config for a quantized file.

    Raises:
        ValueError: for settings that the file has of its own.
    """
    if config.storage not in ("full", IN_FILE):
        raise ValueError(
            f"storage={config.storage!r} has no meaning for a quantized file, whose weights stay as they are; leave "
            "storage out."
        )
    config = copy.deepcopy(config)
    config.peft_version = None  # or it would pass for a saved one
    config.storage = IN_FILE  # type: ignore[assignment]
    config.__post_init__()
    return config


def _config(adapter: DLQATConfig | str | Path) -> DLQATConfig:
    """The adapter's config, which must be one for files.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(adapter, DLQATConfig):
        return in_file_config(adapter)
    config = DLQATConfig.from_pretrained(str(adapter))
    if not isinstance(config, DLQATConfig) or config.storage != IN_FILE:
        raise ValueError(
            f"adapter={str(adapter)!r} was not trained on a quantized file; load it on its own base model by "
            "PeftModel.from_pretrained."
        )
    return config
