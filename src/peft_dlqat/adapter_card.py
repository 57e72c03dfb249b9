"""The package's section of an adapter's model card (README.md)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .methods import METHODS

if TYPE_CHECKING:
    from .config import DLQATConfig

_START, _END = "<!-- peft_dlqat -->", "<!-- /peft_dlqat -->"


def write_section(directory: str | os.PathLike[str], config: DLQATConfig) -> None:
    """Add or replace the section in `directory`/README.md; nothing is written where there is no card yet."""
    path = Path(directory) / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    section = f"{_START}\n{render(config)}\n{_END}"
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


def render(config: DLQATConfig) -> str:
    """The section as Markdown: how to load the adapter, its grid, its size, and what calibration did."""
    method = METHODS[config.method]
    base = config.base_model_name_or_path or "BASE_MODEL"
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
    if config.method != "peqa":  # which has none
        lines.append(f"| low-rank update | r = {config.r}, lora_alpha = {config.lora_alpha} |")
    for name in ("bits_pattern", "group_size_pattern", "rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, name):
            lines.append(f"| {name} | {pattern} |")
    record = config.record
    if {"adapter_parameters", "base_parameters"} <= record.keys():
        adapter, base_count = record["adapter_parameters"], record["base_parameters"]
        share = adapter / (adapter + base_count)
        lines.append(f"| trained parameters | {adapter:,} of {adapter + base_count:,} ({share:.2%}) |")
    lines.append(f"| calibration | {_calibration(record.get('calibration'))} |")
    return "\n".join(lines)


def _calibration(record: dict[str, Any] | None) -> str:
    """What calibration did, from the record that it left."""
    if record is None:
        return "none: trained on the initial grid"
    fitted = "fitted to the layers' inputs, " if record["loss_fitted"] is not None else ""
    steps = f"{record['steps']} steps{' by blocks' if record['by'] == 'blocks' else ''}, {record['objective']}"
    loss = f"loss {record['loss_before']:.4f} -> {record['loss_after']:.4f}"
    kept = {"before": "; nothing gained, and the initial grid was kept", "fitted": "", "after": ""}[record["kept"]]
    return f"{fitted}{steps}: {loss}{kept}"
