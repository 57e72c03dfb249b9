"""Where a model will run, in a word of the command line: "gguf:Q3_K", "vllm:4", "mlx"."""

from __future__ import annotations

import json
from typing import Any

from ..config import DLQATConfig

DESTINATIONS = "gguf:TYPE (such as gguf:Q3_K), vllm:BITS, mlx:BITS, transformers:BITS or gptqmodel:BITS"


def config_for(to: str | None, bits: int | None, settings: list[str], **others: Any) -> tuple[DLQATConfig, str | None]:
    """The config for a destination, or for so many bits; and the format to export to.

    Args:
        to: see `DESTINATIONS`; None for none.
        bits: width of a code.
        settings: fields of the config as NAME=VALUE; a value is JSON, or else a word.
        others: further fields.

    Raises:
        ValueError: for neither destination nor bits, a destination or a field that is unknown, or what no layer could
            take.
    """
    options = {"bits", "export", *others}
    fields = {"task_type": "CAUSAL_LM", **others, **dict(_setting(entry, options) for entry in settings)}
    if to is None:
        if bits is None:
            raise ValueError(f"say what for: --bits 3, or --to DESTINATION: {DESTINATIONS}.")
        return DLQATConfig(bits=bits, **fields), None
    engine, _, kind = to.partition(":")
    if kind.isdecimal():
        if bits not in (None, int(kind)):
            raise ValueError(f"--bits {bits} and --to {to} ask for different widths; leave one out.")
        bits, kind = int(kind), ""
    config = DLQATConfig.for_engine("llama.cpp" if engine == "gguf" else engine, kind or None, bits, **fields)
    assert config.export
    return config, config.export[0]


def config_for_file(format: str, to: str | None, bits: int | None, settings: list[str], **others: Any) -> DLQATConfig:
    """As `config_for`, for a quantized file that is trained and written again in its own format.

    Raises:
        ValueError: for a destination or bits: the file has its own.
    """
    for option, value in (("--to", to), ("--bits", bits)):
        if value is not None and value != format:
            raise ValueError(
                f"{option} {value} has no meaning for a quantized file, which keeps its types; leave it out."
            )
    options = {"bits", "export", *others}
    fields = {"task_type": "CAUSAL_LM", **others, **dict(_setting(entry, options) for entry in settings)}
    return DLQATConfig(**fields)


def _setting(entry: str, options: set[str]) -> tuple[str, Any]:
    name, equals, value = entry.partition("=")
    if name in options:
        raise ValueError(f"--set {entry}: {name} has an option of its own; --to sets export.")
    known = DLQATConfig.__dataclass_fields__
    if not equals or name not in known:
        raise ValueError(f"--set {entry} must be NAME=VALUE, with a name among {', '.join(sorted(known))}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
