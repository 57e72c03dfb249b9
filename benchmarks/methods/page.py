"""Writes the tables of docs/benchmarks.md from the results that are there.

python benchmarks/methods/page.py
"""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from pages import fill  # noqa: E402
from run import rates_of  # noqa: E402
from runs import Results  # noqa: E402
from tables import FULL_PRECISION, kl, load, spread  # noqa: E402

PAGE = HERE.parents[1] / "docs" / "benchmarks.md"
RESULTS = HERE.parent / "results" / "methods"
# Heading of a table: its columns, and of each the model and the setting.
TABLES = {
    "stories260k": {name: ("stories260k", name) for name in ("3bit-row", "3bit-g32", "2bit-g32", "3bit-row-r32")},
    "groups of 43": {name: ("stories260k", name) for name in ("3bit-g32-g43", "2bit-g32-g43")},
    "sampled anew": {"3bit-row": ("stories260k-sampled", "3bit-row")},
    "domains": {
        "fitted on docstrings": ("embedded", "fit-on-training-text"),
        "on the reference": ("embedded", "fit-on-other-text"),
        "calibrated on docstrings": ("embedded", "calibration-100-on-training-text"),
        "calibrated on the reference": ("embedded", "calibration-100-on-other-text"),
    },
    "shapes": {
        label: (model, "shapes-2bit-g32")
        for label, model in (("LLaMA", "embedded"), ("GPT-2", "gpt2"), ("OPT", "opt"))
    },
    "group sizes": {
        label: ("embedded", setting)
        for label, setting in (
            ("one a row", "groups-row"),
            ("of 128", "groups-128"),
            ("of 64", "groups-64"),
            ("of 32", "groups-32"),
        )
    },
    "k-quants": {name: ("embedded", name) for name in ("q3_k", "3bit-g32-symmetric", "q2_k", "2bit-g32-float")},
}
CEILING = "lsq"
# What is changed, row-wise at 3 bits with r = 8 and real-valued offsets, and the setting where it is.
QUESTIONS = {
    "nothing": "3bit-row",
    "100 of the 800 steps calibrate s and b": "calibration-100",
    "1000 steps calibrate s and b before 800 train": "calibration-1000-before-800",
    "the grid is fitted on random tokens": "calibration-on-random-tokens",
    "4 bits": "4bit-row",
    "2 bits": "2bit-row",
    "groups of 32": "3bit-g32",
    "groups of 16": "groups-16",
    "r = 32": "3bit-row-r32",
    "r = 64": "rank-64",
    "integer zeros": "integer-zero",
    "no zeros": "symmetric",
    "only `bits=3` is set": "bits-only",
    "gradients are clipped to a norm of 1, the Trainer's default": "clipped",
}


def results_of(model: str, setting: str) -> dict[str, dict[str, Any]]:
    """The results of a setting by contender."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / model / setting).glob("*.json"))}
    return {name: results for name, results in found.items() if results["runs"] and name != FULL_PRECISION}


@cache
def given_rates(setting: str, contender: str) -> list[float]:
    """The learning rates that the setting's experiment gives a contender to try."""
    experiments = [json.loads(path.read_text()) for path in sorted((HERE / "experiments").glob("*.json"))]
    return next(rates_of(each, contender) for each in experiments if setting in each["settings"])


def unfinished(results: dict[str, Any], model: str, setting: str) -> bool:
    """Whether the search was not let go on while the best rate was at an end, or a better rate's runs are to come."""
    if not results["search"]:
        return False
    found = Results(RESULTS / model / setting / f"{results['contender']}.json", results)
    searched, seeds = results["search"][0]["seed"], {run["seed"] for run in results["runs"]}
    missing = any(not found.has("runs", seed, lr) for lr in found.best_lrs(searched) for seed in seeds)
    return missing or bool(found.next_rates(given_rates(setting, results["contender"]), searched))


def table(wanted: dict[str, tuple[str, str]]) -> str:
    """Held-out KL, one line a contender and one column a setting; the lowest but the ceiling's in bold."""
    columns = {label: found for label, (model, name) in wanted.items() if (found := results_of(model, name))}
    width = {
        name: found.get("dlqat", next(iter(found.values())))["runs"][0]["bits_per_weight"]
        for name, found in columns.items()
    }
    contenders = {name for found in columns.values() for name in found}

    def order(contender: str) -> tuple[float, ...]:
        return tuple(kl(found[contender]) if contender in found else float("inf") for found in columns.values())

    def cell(name: str, contender: str) -> str:
        found = columns[name]
        if contender not in found:
            return ""
        lowest = min((kl(results), other) for other, results in found.items() if other != CEILING)[1]
        digits = next(
            digits for digits, least in ((3, 0.02), (4, 0.002), (5, -math.inf)) if kl(found[lowest]) >= least
        )
        text = spread([run["kl"] for run in found[contender]["runs"]], digits)
        text = f"**{text}**" if contender == lowest and len(found) > 1 else text
        if "unmerged" in found[contender]["runs"][0]:
            text += f" ({spread([run['unmerged']['kl'] for run in found[contender]['runs']])})"
        return f"{text} °" if unfinished(found[contender], *wanted[name]) else text

    def own_width(contender: str) -> str:
        """Where it is not the column's."""
        runs = {name: found[contender]["runs"] for name, found in columns.items() if contender in found}
        widths = {name: of[0]["bits_per_weight"] for name, of in runs.items()}
        differ = any(f"{own:.2f}" != f"{width[name]:.2f}" for name, own in widths.items())
        return f"{contender}: {' / '.join(f'{own:.2f}' for own in widths.values())}" if differ else ""

    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines.append("| bits per weight | " + " | ".join(f"{width[name]:.2f}" for name in columns) + " |")
    for contender in sorted(contenders, key=order):
        lines.append(f"| {contender} | " + " | ".join(cell(name, contender) for name in columns) + " |")
    if others := list(filter(None, map(own_width, sorted(contenders, key=order)))):
        lines += ["", f"Bits per weight of {'; '.join(others)}."]
    return "\n".join(lines)


def question_table() -> str:
    """Held-out KL of DL-QAT, one line a question."""
    lines = ["| changed | bits per weight | held-out KL | runs |", "|---|---|---|---|"]
    versions: dict[str, list[str]] = {}
    for changed, setting in QUESTIONS.items():
        if found := results_of("stories260k", setting).get("dlqat"):
            width, text = found["runs"][0]["bits_per_weight"], spread([run["kl"] for run in found["runs"]], 3)
            lines.append(f"| {changed} | {width:.2f} | {text} | {len(found['runs'])} |")
            for version in {run.get("versions", found["versions"])["transformers"] for run in found["runs"]}:
                versions.setdefault(version, []).append(changed)
    if len(versions) > 1:
        of_each = "; ".join(f"{version}: {', '.join(changes)}" for version, changes in sorted(versions.items()))
        lines += ["", f"By version of transformers, {of_each}."]
    return "\n".join(lines)


def task_table() -> str:
    """Of the contenders that were asked questions, lowest KL first: KL, and accuracy on each task."""
    found = load(RESULTS / "embedded").get("tasks-2bit-g32")
    if not found:
        return "Not run yet."
    tasks = list(found[0]["runs"][0]["tasks"])
    lines = ["| | held-out KL | " + " | ".join(f"{task}, %" for task in tasks) + " | runs |"]
    lines.append("|---" * (3 + len(tasks)) + "|")
    for results in found:
        runs = results["runs"]
        accuracies = [spread([100 * run["tasks"][task] for run in runs], 1) for task in tasks]
        cells = [results["contender"], spread([run["kl"] for run in runs], 4), *accuracies, str(len(runs))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost(model: str) -> str:
    """How long the runs of a model took, the search of the learning rates with them."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / model).glob("*/*.json"))]
    kinds = ("runs", "search", "other_rates")
    runs = [run for results in found for kind in kinds for run in results.get(kind, [])]
    return f"{len(runs)} runs, {sum(run['seconds'] for run in runs) / 3600:.1f} hours of one core"


def tables() -> dict[str, str]:
    """Markdown by heading."""
    found = {
        heading: table(columns) if any(results_of(*column) for column in columns.values()) else "Not run yet."
        for heading, columns in TABLES.items()
    }
    models = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())
    lines = ["| model | in all |", "|---|---|", *(f"| {model} | {cost(model)} |" for model in models)]
    return {**found, "questions": question_table(), "tasks": task_table(), "cost": "\n".join(lines)}


if __name__ == "__main__":
    fill(PAGE, tables())
