"""What is refused before an export begins, and what it warns of."""

from __future__ import annotations

import importlib.util
import warnings

import torch

from ..formats import RULES, Rule
from .source import Source

# What writing a format imports.
_PACKAGES = {"compressed-tensors": "compressed_tensors", "gguf": "gguf"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EMBEDDINGS = (*_DTYPES, "q8_0")


def rule_of(format: str) -> Rule:
    """What a format holds.

    Raises:
        ValueError: for an unknown format.
        ImportError: if its package is missing; names the extra.
    """
    if format not in RULES:
        raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, RULES))}.")
    package = _PACKAGES.get(format)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ImportError(
            f"format={format!r} needs the package {package.replace('_', '-')}; "
            f"install it by pip install 'peft-dlqat[{RULES[format].extra}]'."
        )
    return RULES[format]


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a user has written, if any."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(map(repr, _DTYPES))}.")
    return _DTYPES.get(name)


def check_embeddings(embeddings: str | None) -> None:
    """Refuse a dtype of embeddings and output head that GGUF is not written with."""
    if embeddings is not None and embeddings not in _EMBEDDINGS:
        raise ValueError(f"embeddings={embeddings!r} must be one of {', '.join(map(repr, _EMBEDDINGS))}.")


def check_base(source: Source) -> None:
    """Refuse a base model whose weights are not those that the adapter was trained on.

    Raises:
        ValueError: if the checksums differ. An adapter without one, of an older version, is not checked.
    """
    recorded = source.adapter.record.get("base", {}).get("checksum")
    if recorded is not None and recorded != source.base_checksum:
        name = source.base or source.config.model_type
        raise ValueError(
            f"the weights of the base model {name!r} are not those that the adapter was trained on (checksum "
            f"{source.base_checksum[:12]}, not {recorded[:12]}): codes would be others; export the model as it was "
            "trained, or pass the folder or hub id of its base by base=..."
        )


def warn_if_unfinished(source: Source) -> None:
    """Warn of an adapter that was never trained, or never calibrated, saying what is exported then."""
    if source.untrained:
        warnings.warn(
            f"adapter {source.adapter_name!r} was never trained (B is zero and m one): what is exported is the base "
            "model rounded to nearest on its grid.",
            stacklevel=3,
        )
    elif "calibration" not in source.adapter.record:
        warnings.warn(
            f"adapter {source.adapter_name!r} was never calibrated: it was trained on its initial grid "
            f"(init={source.adapter.init!r}); calibrate before training for better accuracy.",
            stacklevel=3,
        )
