"""Knowing a base model again: an adapter's codes mean another model on other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

# Values of a weight that are looked at: other weights differ in nearly all of them, and the whole of a large model
# would take minutes.
_SAMPLE = 2**16


def weight_checksum(weight: torch.Tensor) -> str:
    """A checksum of a weight's shape and of up to 2**16 of its values, evenly spread; the same in any exact dtype."""
    values = weight.detach().reshape(-1)
    step = -(-values.numel() // _SAMPLE)
    sample = values[::step].float().cpu().contiguous()
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def base_record(weights: Mapping[str, str], tensors: Iterable[torch.Tensor]) -> dict[str, dict[str, str]]:
    """What an adapter's config keeps of its base model: checksum and dtype of the adapted weights."""
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    record = {"checksum": base_checksum(weights)}
    return {"base": record | ({"dtype": dtypes.pop()} if len(dtypes) == 1 else {})}


def base_checksum(weights: Mapping[str, str]) -> str:
    """One checksum for those of all adapted weights, by module name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name]}\n".encode())
    return digest.hexdigest()
