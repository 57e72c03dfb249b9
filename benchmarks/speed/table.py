"""Writes the tables of docs/speed.md, and a plot, from the results that are there.

python benchmarks/speed/table.py
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pages import fill

RESULTS = Path(__file__).parents[1] / "results" / "speed"
PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
METHODS = Path(__file__).parents[1] / "results" / "methods" / "stories260k"
# Settings of benchmarks/methods/experiments/shortcuts.json, by what they are set against.
SHORTCUTS = {
    "3bit-row": ("3bit-row-bf16-gradient", "3bit-row-lowrank", "3bit-row-int8", "3bit-row-int4"),
    "3bit-g32": ("3bit-g32-row-magnitude", "3bit-g32-lowrank"),
    "2bit-row": ("2bit-row-lowrank",),
    "2bit-g32": ("2bit-g32-row-magnitude", "2bit-g32-lowrank", "2bit-g32-int8", "2bit-g32-int4", "2bit-g32-int2"),
}


def layer_table(results: dict[str, Any]) -> str:
    """One line a contender: time, with its quartiles, and what is kept for backward, of the first piece of work."""
    row = next(iter(results["rows"].values()))
    lines = ["| | time / LoRA's | quartiles | kept for backward beside the input, MB |", "|---|---|---|---|"]
    for contender, ratio in row["time_ratio"].items():
        kept, quartiles = row["kept_bytes"][contender] / 1e6, f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        lines.append(f"| {contender} | {ratio['median']:.2f} | {quartiles} | {kept:.1f} |")
    return "\n".join(lines)


def growth_table(results: dict[str, Any]) -> str:
    """Time over LoRA's, one line a piece of work, one column a contender that has done more than the first."""
    first, *others = (row["time_ratio"] for row in results["rows"].values())
    names = [name for name in first if name != "LoRA" and any(name in row for row in others)]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for work, row in results["rows"].items():
        cells = (f"{row['time_ratio'][name]['median']:.2f}" if name in row["time_ratio"] else "" for name in names)
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_table(results: dict[str, Any]) -> str:
    """One line a contender."""
    lines = [
        "| | time / LoRA's | quartiles | peak memory / LoRA's | resident before training, GB | peak, GB | kept for "
        "backward, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        memory, time = row["bytes"], row["time_ratio"]
        lines.append(
            f"| {name} | {time['median']:.2f} | {time['low']:.2f} to {time['high']:.2f} | {row['peak_ratio']:.2f} | "
            f"{memory['before training'] / 1e9:.2f} | {memory['peak'] / 1e9:.2f} | "
            f"{memory['kept for backward'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def gpu_layer_table(results: dict[str, Any]) -> str:
    """One line a shape, number of tokens and contender."""
    lines = ["| | tokens | | time / LoRA's | layer, MB | step beside it, MB |", "|---|---|---|---|---|---|"]
    for shape, by_tokens in results["rows"].items():
        for tokens, rows in by_tokens.items():
            for name, row in rows.items():
                step = "" if row["bytes_of_step"] is None else f"{row['bytes_of_step'] / 1e6:.1f}"
                lines.append(
                    f"| {shape} | {tokens} | {name} | {row['time_ratio']['median']:.2f} | "
                    f"{row['bytes_of_layer'] / 1e6:.1f} | {step} |"
                )
    return "\n".join(lines)


def gpu_model_table(results: dict[str, Any]) -> str:
    """One line a size, batch and contender; empty where it did not fit."""
    lines = ["| | | time / LoRA's | tokens a second | peak, GB |", "|---|---|---|---|---|"]
    for work, rows in results["rows"].items():
        for name, row in rows.items():
            runs = [run for run in row["runs"] if "error" not in run]
            ratio = f"{statistics.median(row['time_ratios']):.2f}" if row["time_ratios"] else ""
            speed = f"{max(run['tokens_per_second'] for run in runs):.0f}" if runs else ""
            peak = f"{runs[0]['peak_GB']:.2f}" if runs and runs[0]["peak_GB"] else ""
            lines.append(f"| {work} | {name} | {ratio} | {speed} | {peak} |")
    return "\n".join(lines)


def held_out_kl(setting: str) -> tuple[float, int] | None:
    """Mean of DL-QAT's runs, and their number."""
    path = METHODS / setting / "dlqat.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    return (statistics.mean(run["kl"] for run in runs), len(runs)) if runs else None


def shortcut_table() -> str:
    """One line a shortcut, beside the default on the same grid."""
    lines = ["| | held-out KL | of the default | runs |", "|---|---|---|---|"]
    for default, shortcuts in SHORTCUTS.items():
        for name in shortcuts:
            found, base = held_out_kl(name), held_out_kl(default)
            if found and base:
                lines.append(f"| {name} | {found[0]:.3f} | {base[0]:.3f} | {found[1]} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Ratios with their quartiles, one panel a contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {name: row["time_ratio"] for name, row in results["rows"].items()}
    names = [
        name
        for name in next(iter(rows.values()))
        if name.startswith("DL-QAT") and all(name in r for r in rows.values())
    ]
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names) + 1, 3.6), sharey=True, sharex=True)
    for axis, name in zip(axes, names, strict=True):
        for i, row in enumerate(rows.values()):
            axis.barh(i, row[name]["median"], color="tab:blue")
            axis.plot([row[name]["low"], row[name]["high"]], [i, i], color="black")
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set_title(name.replace(", ", "\n"), fontsize=8)
        axis.set_xlabel("time / LoRA's", fontsize=8)
    axes[0].set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tables() -> dict[str, str]:
    """Markdown by name of the results file, for those that are there."""
    made = {}
    kinds = (
        ("layer", layer_table),
        ("growth", growth_table),
        ("model", model_table),
        ("gpu-layer", gpu_layer_table),
        ("gpu-model", gpu_model_table),
    )
    for name, make in kinds:
        path = RESULTS / f"{'layer' if name == 'growth' else name}.json"
        if path.exists():
            made[name] = make(json.loads(path.read_text()))
    return {**made, "shortcuts": shortcut_table()}


if __name__ == "__main__":
    fill(PAGE, tables())
    if (RESULTS / "layer.json").exists():
        draw(json.loads((RESULTS / "layer.json").read_text()), RESULTS / "layer.png")
