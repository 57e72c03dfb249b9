"""Where a model will run, in a word of the command line: "gguf:Q3_K", "vllm:4", "mlx"."""

from __future__ import annotations

import json
from typing import Any

from ..config import DLQATConfig

DESTINATIONS = "gguf:TYPE (such as gguf:Q3_K), vllm:BITS, mlx:BITS, transformers:BITS"
# Words for an engine, and the format that it reads.
_ENGINES = {
    "gguf": ("llama.cpp", "gguf"),
    "llama.cpp": ("llama.cpp", "gguf"),
    "vllm": ("vllm", "compressed-tensors"),
    "transformers": ("transformers", "compressed-tensors"),
    "mlx": ("mlx", "mlx"),
}


def config_for(to: str | None, bits: int | None, settings: list[str], **others: Any) -> tuple[DLQATConfig, str | None]:
    """The config for a destination, or for so many bits; and the format to export to.

    Args:
        to: see `DESTINATIONS`; None for none.
        bits: width of a code.
        settings: fields of the config as NAME=VALUE; a value is JSON, or else a word.
        others: further fields.

    Raises:
        ValueError: for neither destination nor bits, an unknown destination, or an unknown field.
    """
    fields = {"task_type": "CAUSAL_LM", **others, **dict(_setting(entry) for entry in settings)}
    if to is None:
        if bits is None:
            raise ValueError(f"say what for: --bits 3, or --to DESTINATION: {DESTINATIONS}.")
        return DLQATConfig(bits=bits, **fields), None
    word, _, kind = to.partition(":")
    if word not in _ENGINES:
        raise ValueError(f"--to {to}: {word!r} is no destination; take {DESTINATIONS}.")
    engine, format = _ENGINES[word]
    if kind.isdecimal():
        bits, kind = int(kind), ""
    width = {} if bits is None else {"bits": bits}
    return DLQATConfig.for_engine(engine, kind or None, **width, **fields), format


def _setting(entry: str) -> tuple[str, Any]:
    name, equals, value = entry.partition("=")
    known = DLQATConfig.__dataclass_fields__
    if not equals or name not in known:
        raise ValueError(f"--set {entry} must be NAME=VALUE, with a name among {', '.join(sorted(known))}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
