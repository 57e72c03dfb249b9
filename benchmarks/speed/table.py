"""The tables of docs/speed.md, and plots, from the results that are there.

python benchmarks/speed/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "speed"


def layer_table(results: dict[str, Any]) -> str:
    """One line a piece of work, one column a contender that all have; then the others on the first piece of work."""
    rows = {name: row["time_ratio"] for name, row in results["rows"].items()}
    everywhere = [name for name in next(iter(rows.values())) if all(name in row for row in rows.values())]
    columns = [name for name in everywhere if name != "LoRA"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[key]['median']:.2f}" for key in columns) + " |"
        for name, row in rows.items()
    ]
    first_name, first = next(iter(rows.items()))
    others = [name for name in first if name not in everywhere]
    lines += ["", f"Others, {first_name}:", "", "| | time / LoRA's |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {first[name]['median']:.2f} |" for name in others)])


def model_table(results: dict[str, Any]) -> str:
    """One line a contender."""
    lines = [
        "| | time / LoRA's | peak memory / LoRA's | resident before training, GB | peak, GB |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        memory = row["resident bytes"]
        lines.append(
            f"| {name} | {row['time_ratio']['median']:.2f} | {row['peak_ratio']:.2f} | "
            f"{memory['before training'] / 1e9:.2f} | {memory['peak'] / 1e9:.2f} |"
        )
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
    for name, make in (("layer", layer_table), ("model", model_table)):
        path = RESULTS / f"{name}.json"
        if path.exists():
            made[name] = make(json.loads(path.read_text()))
    return made


if __name__ == "__main__":
    for table in tables().values():
        print(table, end="\n\n")
    if (RESULTS / "layer.json").exists():
        draw(json.loads((RESULTS / "layer.json").read_text()), RESULTS / "layer.png")
