"""Folders of small random models, quantized by the packages that have the formats, and by this one."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel


def compressed(
    model: PreTrainedModel, folder: Path, bits: int, symmetric: bool, group_size: int | None, dtype: torch.dtype
) -> Path:
    """By compressed-tensors' own rounding and packing; a group_size of None is a row."""
    from compressed_tensors import __version__
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = "channel" if group_size is None else "group"
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    model = copy.deepcopy(model).to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items() if not _is_tied(model, name)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = state.pop(f"{name}.weight")
            groups = weight.unflatten(-1, (-1, group_size or weight.shape[1]))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            parts = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
            found = PackedQuantizationCompressor.compress(parts, scheme)
            state |= {f"{name}.{part}": value for part, value in found.items()}
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    section = config.model_dump(mode="json", exclude_none=True) | {"version": __version__}
    if not symmetric:
        section["dequantize"] = True  # which the installed versions need to load zero points
    return _saved(model, folder, state, quantization_config=section)


def of_mlx(model: PreTrainedModel, folder: Path, bits: int, group_size: int, dtype: torch.dtype) -> Path:
    """By MLX's own rounding and packing, the embedding too, as mlx-lm's converter does."""
    import mlx.core as mx

    model = copy.deepcopy(model).to(dtype)
    state = {name: value for name, value in model.state_dict().items() if not _is_tied(model, name)}
    of_dtype = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[dtype]
    made = {}
    for name, value in state.items():
        own = mx.array(value.float().numpy()).astype(of_dtype)
        if value.dim() == 2:
            parts = zip(("weight", "scales", "biases"), mx.quantize(own, group_size, bits), strict=True)
            made |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts}
        else:
            made[name] = own
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), made, metadata={"format": "mlx"})
    section = {"group_size": group_size, "bits": bits, "mode": "affine"}
    return _saved(model, folder, {}, quantization=section, quantization_config=section)


def _saved(model: PreTrainedModel, folder: Path, state: Mapping[str, torch.Tensor], **sections: Any) -> Path:
    """Write tensors, a config with sections as engines expect it, and files that a model has beside."""
    folder.mkdir(parents=True, exist_ok=True)
    if state:
        save_file(
            {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    content = model.config.to_dict() | {"architectures": [type(model).__name__]}
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    content |= {"rope_theta": content["rope_parameters"]["rope_theta"], **sections}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("kept as it is")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Checksums of a folder's files by name, but for what an export adds."""
    return {
        inside: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not (inside := path.relative_to(folder).as_posix()).startswith(("dlqat_export", "README"))
    }


def changed(folder: Path, other: Path) -> set[str]:
    """Names of tensors that are not the same in two folders of one file."""
    one, two = (load_file(path / "model.safetensors") for path in (folder, other))
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    head: Any = model.get_output_embeddings()
    inner: Any = model.get_input_embeddings()
    return name == "lm_head.weight" and head.weight is inner.weight
