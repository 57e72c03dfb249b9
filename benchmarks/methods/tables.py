"""The table and the plots of an experiment's results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Whose step counts as 1 in the file that step_times.py writes beside the settings.
UNIT, STEP_TIMES = "dlqat", "step_times.json"
FULL_PRECISION = "full-precision"  # no rival: what all others are compared with
# Settings with fewer contenders than this are not drawn, where others have more.
_COMPARED = 4
_COLUMNS_OF_PANELS = 3
_KL = "held-out KL, nats a token"
_COLUMNS = (
    "",
    "bits per weight",
    "trained parameters",
    "learning rate",
    "KL at the start",
    "held-out KL",
    "perplexity",
    "top token agrees, %",
    "accuracy on tasks, %",
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
    accuracy = (
        spread([100 * statistics.mean(run["tasks"].values()) for run in runs], 1) if runs[0].get("tasks") else ""
    )
    return "| " + " | ".join([*cells, agreement, accuracy, time, str(len(runs))]) + " |"


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
    """KL by setting, against bits a weight, and against the time of a step: a bar or a point a contender."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: pip install matplotlib")
        return
    matplotlib.use("Agg")
    settings = {name: rivals for name, rows in settings.items() if (rivals := [row for row in rows if _is_drawn(row)])}
    contenders = sorted({results["contender"] for rows in settings.values() for results in rows})
    colours = {name: matplotlib.colormaps["tab20"](i % 20) for i, name in enumerate(contenders)}
    compared = {name: rows for name, rows in settings.items() if len(rows) >= _COMPARED} or settings
    timed = {name: times for name in compared if (times := step_times(folder, name))}
    plain = [results for rows in settings.values() for results in rows if _is_plain(results["setting"])]

    def bars(axis: Any, name: str) -> None:
        for i, results in enumerate(compared[name]):
            bar = axis.barh(i, kl(results), color=colours[results["contender"]])
            axis.bar_label(bar, fmt="%.3f", fontsize=7, padding=2)
        axis.set_yticks(range(len(compared[name])), [results["contender"] for results in compared[name]], fontsize=8)
        axis.invert_yaxis()
        axis.set(title=name, xscale="log", xlabel=_KL)
        axis.set_xlim(kl(compared[name][0]) / 2, kl(compared[name][-1]) * 2)
        axis.tick_params(axis="x", which="both", labelbottom=False)

    def against_time(axis: Any, name: str) -> None:
        for results in compared[name]:
            contender, time = results["contender"], timed[name].get(results["contender"])
            if time is not None:
                axis.scatter(time, kl(results), color=colours[contender])
                axis.annotate(contender, (time, kl(results)), fontsize=7)
        axis.set(title=name, yscale="log", xlabel="training time / DL-QAT's", ylabel=_KL)

    def against_bits(axis: Any, _: str) -> None:
        for contender in sorted({results["contender"] for results in plain}):
            row_wise = []
            for results in plain:
                if results["contender"] == contender:
                    point, setting = (results["runs"][0]["bits_per_weight"], kl(results)), results["setting"]
                    axis.scatter(*point, color=colours[contender], marker=f"${setting['bits']}$", s=50)
                    row_wise += [point] if setting["group_size"] == -1 else []
            widths, values = [x for x, _ in sorted(row_wise)], [y for _, y in sorted(row_wise)]
            axis.plot(widths, values, color=colours[contender], linewidth=1)
            axis.plot([], [], "s", color=colours[contender], label=contender)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        axis.set(yscale="log", xlabel="bits per weight; the digit: bits of a code; lines: one scale a row", ylabel=_KL)

    _panels(folder / "kl.png", compared, bars)
    _panels(folder / "bits.png", [""] if plain else [], against_bits, width=7)
    _panels(folder / "time.png", timed, against_time)


def _is_drawn(results: dict[str, Any]) -> bool:
    """All but the model as it is, and what has diverged."""
    return results["contender"] != FULL_PRECISION and math.isfinite(kl(results))


def _is_plain(setting: dict[str, Any]) -> bool:
    """Whether a setting is one of bits and group size alone."""
    return setting.keys() == {"bits", "group_size", "zero_point", "r"} and (setting["zero_point"], setting["r"]) == (
        "float",
        8,
    )


def _panels(path: Path, names: Iterable[Any], panel: Callable[[Any, Any], None], width: float = 4.2) -> None:
    """A picture with a panel for each name, drawn by `panel(axis, name)`; none without names."""
    import matplotlib.pyplot as plt

    names = list(names)
    if not names:
        path.unlink(missing_ok=True)
        return
    columns = min(len(names), _COLUMNS_OF_PANELS)
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1 + width * columns, 4.2 * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        panel(axis, name)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
