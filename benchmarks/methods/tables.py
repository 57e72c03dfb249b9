"""The table and the plots of an experiment's results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Whose step counts as 1 in the file that step_times.py writes beside the settings.
UNIT, STEP_TIMES = "dlqat", "step_times.json"
_COLUMNS = (
    "",
    "bits per weight",
    "trained parameters",
    "learning rate",
    "KL at the start",
    "held-out KL",
    "perplexity",
    "top token agrees, %",
    "a step's time / DL-QAT's",
    "runs",
)


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean, and over several runs ± their standard deviation."""
    values = list(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by setting, lowest KL first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        results = json.loads(path.read_text())
        if results["runs"]:
            found.setdefault(path.parent.name, []).append(results)
    for rows in found.values():
        rows.sort(key=kl)
    return found


def kl(results: dict[str, Any]) -> float:
    """Mean held-out KL of the runs."""
    return statistics.mean(run["kl"] for run in results["runs"])


def step_times(folder: Path, setting: str) -> dict[str, float]:
    """Of the contenders that were timed in turns, a training step's time over DL-QAT's."""
    path = folder / STEP_TIMES
    found = json.loads(path.read_text()).get(setting, {"ratios": {}}) if path.exists() else {"ratios": {}}
    return {contender: ratio["median"] for contender, ratio in found["ratios"].items()}


def row(results: dict[str, Any], times: dict[str, float]) -> str:
    """A line of the table."""
    runs = results["runs"]
    trained = f"{runs[0]['trained_parameters']:,}" if "trained_parameters" in runs[0] else ""
    start = spread([run["start"]["kl"] for run in runs]) if "start" in runs[0] else ""
    lr = f"{runs[0]['lr']:g}" if runs[0].get("lr") else ""
    time = f"{times[results['contender']]:.2f}" if results["contender"] in times else ""
    beside = ""
    if "unmerged" in runs[0]:
        beside = f" ({spread([run['unmerged']['kl'] for run in runs])} with its LoRA left beside)"
    perplexity = spread([math.exp(run["loss"]) for run in runs], 2)
    agreement = spread([100 * run["agreement"] for run in runs], 1)
    width = f"{runs[0]['bits_per_weight']:.2f}"
    cells = [results["contender"], width, trained, lr, start, spread([run["kl"] for run in runs]) + beside, perplexity]
    return "| " + " | ".join([*cells, agreement, time, str(len(runs))]) + " |"


def write_tables(folder: Path) -> str:
    """Write table.md and the plots into the folder; returns the table."""
    settings = load(folder)
    lines = []
    for name, rows in settings.items():
        times = step_times(folder, name)
        lines += [
            f"### {name}",
            "",
            "| " + " | ".join(_COLUMNS) + " |",
            "|---" * len(_COLUMNS) + "|",
            *(row(results, times) for results in rows),
            "",
        ]
    table = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table)
    draw(settings, folder)
    return table


def draw(settings: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """KL by setting, and KL against the time of a step, one line or point a contender."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contenders = sorted({results["contender"] for rows in settings.values() for results in rows})
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(contenders)}
    figure, axes = plt.subplots(1, len(settings), figsize=(1 + 3.6 * len(settings), 4.2), squeeze=False)
    for axis, (name, rows) in zip(axes[0], settings.items(), strict=True):
        for i, results in enumerate(rows):
            values = [run["kl"] for run in results["runs"]]
            axis.barh(i, statistics.mean(values), color=colours[results["contender"]])
            axis.scatter(values, [i] * len(values), color="black", s=6, zorder=3)
        axis.set_yticks(range(len(rows)), [results["contender"] for results in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("held-out KL, nats a token")
    figure.tight_layout()
    figure.savefig(folder / "kl.png", dpi=120)
    plt.close(figure)

    figure, axes = plt.subplots(1, len(settings), figsize=(1 + 3.6 * len(settings), 4.2), squeeze=False)
    for axis, (name, rows) in zip(axes[0], settings.items(), strict=True):
        times = step_times(folder, name)
        for results in rows:
            contender, time = results["contender"], times.get(results["contender"])
            if time is not None:
                axis.scatter(time, kl(results), color=colours[contender])
                axis.annotate(contender, (time, kl(results)), fontsize=7)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("a training step's time / DL-QAT's")
    axes[0][0].set_ylabel("held-out KL, nats a token")
    figure.tight_layout()
    figure.savefig(folder / "time.png", dpi=120)
    plt.close(figure)
