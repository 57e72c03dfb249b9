"""The package on the Hub: its section of an adapter's model card, and its place in PEFT's registry."""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType, register_peft_method
from safetensors import safe_open

from .methods import METHODS

if TYPE_CHECKING:
    from .config import DLQATConfig

NAME = "dlqat"
_START, _END = "<!-- peft_dlqat -->", "<!-- /peft_dlqat -->"


def write_section(directory: str | os.PathLike[str], config: DLQATConfig) -> None:
    """Add or replace the section in `directory`/README.md; nothing is written where there is no card yet."""
    path = Path(directory) / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    section = f"{_START}\n{_section(config, directory)}\n{_END}"
    if _START in text and _END in text:
        text = re.sub(f"{_START}.*?{_END}", lambda _: section, text, flags=re.DOTALL)
    else:
        head, marker, body = _split_metadata(text)
        text = f"{head}{marker}\n{section}\n\n{body.lstrip()}"
    path.write_text(text, encoding="utf-8")


def _split_metadata(text: str) -> tuple[str, str, str]:
    """(YAML block, its closing line, the rest); the first two are empty where there is no block."""
    match = re.match(r"(---\n.*?)(\n---\n)", text, flags=re.DOTALL)
    return (match[1], match[2], text[match.end() :]) if match else ("", "", text)


def _section(config: DLQATConfig, directory: str | os.PathLike[str]) -> str:
    """The section as Markdown: how to load the adapter, its grid, its size, and whether it was calibrated."""
    method = METHODS[config.method]
    base = config.base_model_name_or_path or "BASE_MODEL"
    if config.storage == "file":
        return _of_file(config)
    group = "one scale a row" if config.group_size == -1 else f"groups of {config.group_size} input channels"
    lines = [
        f"# {config.bits}-bit {method.title} adapter",
        "",
        f"Trained inside a low-bit quantizer ([{method.title}](https://arxiv.org/abs/{method.arxiv})) with "
        "`pip install peft-dlqat`: merged into its base model, every adapted weight lies on the grid below.",
        "",
        "```python",
        "import peft_dlqat  # registers the method with PEFT; without it loading fails with KeyError: 'DLQAT'",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "THIS_REPOSITORY")',
        "model = model.merge_and_unload()  # optional: plain weights, the same logits",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| grid | {config.bits} bits, {group}, zero point: {config.zero_point}, scales in {config.scale_dtype} |",
    ]
    if "A" in config.resolve_method().trained(config.grids()[0], 1, 1, config.r):
        lines.append(f"| low-rank update | r = {config.r}, lora_alpha = {config.lora_alpha} |")
    for name in ("bits_pattern", "group_size_pattern", "rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, name):
            lines.append(f"| {name} | {pattern} |")
    return "\n".join(lines + _of_tensors(directory))


def _of_file(config: DLQATConfig) -> str:
    """The section of an adapter that belongs to a quantized file."""
    method, name = METHODS[config.method], Path(config.base_model_name_or_path or "FILE").name
    format = '"gguf"' if name.endswith(".gguf") else "model.get_base_model().origin.format"
    return "\n".join(
        (
            f"# {method.title} adapter for {name}",
            "",
            f"Trained inside the blocks of a quantized file ([{method.title}](https://arxiv.org/abs/{method.arxiv})) "
            "with `pip install peft-dlqat`: written back, it is the same kind of file, of the same size.",
            "",
            "```python",
            "from peft_dlqat import export_model, load_quantized",
            "",
            f'model, tokenizer = load_quantized("{name}", "THIS_REPOSITORY")',
            f'export_model(model, "out", {format})  # the file with the trained weights in it',
            "```",
            "",
            "| | |",
            "|---|---|",
            f"| file | {name}, sha256 {config.file_sha256} |",
            f"| low-rank update | r = {config.r}, lora_alpha = {config.lora_alpha} |",
        )
    )


def _of_tensors(directory: str | os.PathLike[str]) -> list[str]:
    """What the saved tensors tell, where they are there."""
    file = Path(directory, SAFETENSORS_WEIGHTS_NAME)
    if not file.is_file():
        return []
    trained, own, adapted, calibrated = 0, 0, 0, True
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  no mapping
            kind = re.search(r"\.dlqat_(scale|zero_point|offset|spec|record)\b", key)
            size = math.prod(tensors.get_slice(key).get_shape())
            if kind is None:
                trained += size
                own += size if ".dlqat_" in key else 0  # not modules_to_save and biases
            elif kind[1] == "scale":
                group_size = tensors.get_tensor(re.sub(r"dlqat_scale.*", "dlqat_spec", key))[1]
                adapted += size * int(group_size)
            elif kind[1] == "record":
                calibrated &= bool(tensors.get_tensor(key)[0])
    share = f", the adapter's own {own / adapted:.2%} of the weights that it adapts" if adapted else ""
    how = "done" if calibrated else "none: trained on the initial scales and zeros"
    return [f"| parameters | {trained:,} beside scales and zeros{share} |", f"| calibration | {how} |"]


def extend_peft_type() -> None:
    """Add `PeftType.DLQAT`, unless it is there: PEFT's own member, or one of an earlier import.

    PEFT's enum is closed, and `register_peft_method` refuses names outside it. So the member is added exactly as the
    class statement would have made it; everything after is PEFT's own.
    """
    member_name = NAME.upper()
    if member_name in PeftType.__members__:
        return
    enum: Any = PeftType
    member = str.__new__(enum, member_name)
    member._name_ = member._value_ = member_name
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(member_name)
    enum._member_map_[member_name] = member
    enum._value2member_map_[member_name] = member
    type.__setattr__(enum, member_name, member)


def register(config_cls: type, model_cls: type) -> None:
    """Make the method known to `get_peft_model`, `PeftModel.from_pretrained` and all the rest.

    Idempotent. Where PEFT already has a method of this name that is not ours, PEFT's stays and a warning says so.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType.DLQAT)  # type: ignore[attr-defined]
    if known is None:
        register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls)
    elif known is not config_cls:
        warnings.warn(
            f"PEFT already has a method named {NAME!r} ({known.__module__}.{known.__qualname__}), which stays in "
            "place: use `from peft import DLQATConfig`, and uninstall peft-dlqat.",
            stacklevel=3,
        )
