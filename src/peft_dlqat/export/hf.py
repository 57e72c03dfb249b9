"""What the formats of a transformers folder share: config.json and tensors that stay dense."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from .fitting import check_finite
from .folder import write_json
from .options import Options
from .source import Entry, Source


def as_dense(value: torch.Tensor, entry: Entry, options: Options) -> torch.Tensor:
    """A tensor as the model keeps it, floating ones in the dtype for what stays dense."""
    if entry.grid is not None and entry.transposed:
        value = value.t()
    if not value.is_floating_point():
        return value
    rounded = value.to(options.dtype)
    check_finite(entry.name, value, rounded, options.dtype, "pass dtype='bfloat16' or 'float32'")
    if not torch.equal(rounded.to(value.dtype), value):
        options.rounded.append(entry.name)
    return rounded


def write_config(source: Source, folder: Path, dtype: torch.dtype, **sections: Any) -> None:
    """Write config.json with the given sections added."""
    config = copy.deepcopy(source.config)
    config.dtype = dtype
    config.architectures = [type(source.model).__name__]
    content = config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    content.pop("_name_or_path", None)
    write_json(folder / "config.json", {key: _plain(value) for key, value in content.items()} | sections)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value
