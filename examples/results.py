"""The table that `finetune.py` prints and saves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BASE, LORA = "full precision, not fine-tuned", "LoRA in full precision"
RTN, LORA_RTN, DLQAT = "round-to-nearest", "LoRA, then round-to-nearest", "DL-QAT"
LORA_CLIPPED = "LoRA, then rounded, clipping outliers"


@dataclass(frozen=True)
class Result:
    """One row: a method at a bit width (None: full precision) and how well it predicts the held-out text."""

    method: str
    bits: int | None
    bits_per_weight: float
    trained_share: float
    loss: float
    accuracy: float
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    def cells(self) -> list[str]:
        return [
            "-" if self.bits is None else str(self.bits),
            self.method,
            f"{self.bits_per_weight:.2f}",
            f"{self.trained_share:.1%}" if self.trained_share else "-",
            f"{self.perplexity:.2f}" if self.perplexity < 1e5 else f"{self.perplexity:.1e}",
            f"{self.accuracy:.1%}",
            *(f"{value:.4g}" for value in self.metrics.values()),
        ]


def header(results: list[Result]) -> list[str]:
    return ["bits", "method", "bits/weight", "trained", "perplexity", "accuracy", *results[0].metrics]


def text_table(results: list[Result], title: str) -> str:
    """For the terminal; a line between the bit widths."""
    rows = [result.cells() for result in results]
    names = header(results)
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i == 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )

    full = sum(widths) + 2 * (len(widths) - 1)
    lines = ["=" * full, title, "=" * full, line(names)]
    for before, result, row in zip([None, *results], results, rows, strict=False):
        if before is None or before.bits != result.bits:
            lines.append("-" * full)
        lines.append(line(row))
    return "\n".join([*lines, "=" * full])


def markdown_table(results: list[Result]) -> str:
    names = header(results)
    rows = [names, ["---:" if i != 1 else "---" for i in range(len(names))], *(result.cells() for result in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def verdicts(results: list[Result]) -> list[str]:
    """A sentence a bit width: how much of what LoRA gained (in held-out loss) is left in the quantized models."""
    found = {(result.method, result.bits): result.loss for result in results}
    if (LORA, None) not in found:
        return []
    gain = found[BASE, None] - found[LORA, None]

    def kept(loss: float) -> str:
        share = (found[BASE, None] - loss) / gain
        return f"{share:.0%}" if share > 0 else "nothing"

    if gain <= 0:
        return ["LoRA gained nothing on this text: train for more steps, or with another --lora_lr."]
    return [
        f"{bits} bits: of the {gain:.2f} nats a token that LoRA gained, rounding to nearest leaves "
        f"{kept(found[LORA_RTN, bits])}, with clipping {kept(found[LORA_CLIPPED, bits])}; "
        f"DL-QAT has {kept(found[DLQAT, bits])}."
        for bits in dict.fromkeys(result.bits for result in results if result.bits is not None)
    ]


def save(
    folder: Path, results: list[Result], curves: dict[str, list[dict[str, Any]]], settings: dict[str, Any]
) -> None:
    """results.md for people; results.json, with the settings and the training curves, for programs."""
    rows = [{**asdict(result), "perplexity": result.perplexity} for result in results]
    text = json.dumps({"settings": settings, "results": rows, "curves": curves}, indent=1)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    lines = [markdown_table(results), "", NOTE, "", *verdicts(results)]
    (folder / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


NOTE = (
    "Perplexity and accuracy of the next token, on held-out text. Bits per weight: of the quantized linear layers, "
    "scales and zeros included; embeddings, norms and the output head stay in full precision and are not counted. "
    "Rounding to nearest is done on each group's whole range; clipping outliers means on the range with the least "
    "squared error, where DL-QAT starts too."
)
