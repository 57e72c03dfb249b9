"""What an experiment has found: one JSON file, one line a run.

    {"settings": {name: what was run}, "work": {model: hash}, "versions": [...], "runs": [...], "step_times": [...]}

A run is {"model", "setting", "contender", "seed", "share", "lr", "versions", figures ...}: `share` is the part of the
steps that it took, 1 for a whole run and less for one of the search of a learning rate, and `versions` counts into the
list. `work` tells the model's weights and the tokens from others; null where it was not noted.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = dict[str, Any]
BEYOND = 3  # learning rates that a search goes beyond the given ones, at most
BY_DEFAULT = "dlqat"  # with LoRA's usual learning rate; the others have theirs searched
EMPTY: dict[str, Any] = {"settings": {}, "work": {}, "versions": [], "runs": [], "step_times": []}


class Results:
    """The file of one experiment; `data` is what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = {key: value.copy() for key, value in EMPTY.items()}
        if path.exists():
            self.data |= json.loads(path.read_text())

    def expect(self, model: str, work: str, setting: str, what: dict[str, Any]) -> None:
        """Note what is about to be run.

        Raises:
            SystemExit: if runs of the same name are there, and of something else.
        """
        known, known_work = self.data["settings"].setdefault(setting, what), self.data["work"].get(model)
        if known != what or known_work not in (None, work):
            other = "model or tokens" if known == what else "setting"
            raise SystemExit(
                f"{self.path} has {setting} of {model} with another {other}; name another file with --results, or "
                "give what is new another name."
            )
        self.data["work"].setdefault(model, work)

    def add(self, kind: str, row: Run) -> None:
        """Append to "runs" or "step_times", and write the file."""
        self.data[kind].append(row)
        self.write()

    def version(self, versions: dict[str, str]) -> int:
        """Where these versions are in the list."""
        if versions not in self.data["versions"]:
            self.data["versions"].append(versions)
        return self.data["versions"].index(versions)

    def of(self, **wanted: Any) -> list[Run]:
        """The runs that have these values."""
        return [run for run in self.data["runs"] if all(run.get(key) == value for key, value in wanted.items())]

    def write(self) -> None:
        """Whole or not at all, a line for each thing in it."""
        parts = []
        for key, value in self.data.items():
            lines = (
                [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in value.items()]
                if isinstance(value, dict)
                else [json.dumps(each) for each in value]
            )
            start, end = "{}" if isinstance(value, dict) else "[]"
            parts.append(f'"{key}": {start}\n' + ",\n".join(lines) + f"\n{end}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        temporary.replace(self.path)


def keep(path: Path, runs: list[Run], what: Run, make: Callable[[], Run]) -> None:
    """Run what is not among `runs` yet, and keep it in their file."""
    if not any(run.items() >= what.items() for run in runs):
        runs.append({**what, **make()})
        path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)


def kl(runs: list[Run]) -> float:
    """Their mean; what has diverged is worse than all else."""
    return statistics.mean(run["kl"] if math.isfinite(run["kl"]) else math.inf for run in runs)


def that_count(runs: list[Run]) -> list[Run]:
    """Of a contender's runs of one setting the whole ones of one learning rate, by seed.

    It is the rate of most runs, and among these the best; of `BY_DEFAULT` the one that it took last.
    """
    by_rate: dict[float | None, list[Run]] = {}
    for run in whole(runs):
        by_rate.setdefault(run.get("lr"), []).append(run)
    if not by_rate:
        return []
    if runs[0]["contender"] == BY_DEFAULT:
        rate = whole(runs)[-1]["lr"]
    else:
        rate = min(by_rate, key=lambda rate: (-len(by_rate[rate]), kl(by_rate[rate])))
    return sorted(by_rate[rate], key=lambda run: run["seed"])


def whole(runs: list[Run]) -> list[Run]:
    """Those of all steps."""
    return [run for run in runs if run["share"] == 1]


def tried(runs: list[Run], seed: int) -> dict[float, float]:
    """KL by learning rate, of the search."""
    return {run["lr"]: kl([run]) for run in runs if run["share"] < 1 and run["seed"] == seed}


def next_rates(runs: list[Run], rates: list[float], seed: int) -> list[float]:
    """What a search has still to try: `rates`, then half or twice the best while that is at an end."""
    found = tried(runs, seed)
    if missing := [lr for lr in rates if lr not in found]:
        return missing
    best = min(found, key=lambda lr: found[lr])
    beyond = {min(found): best / 2, max(found): best * 2}
    return [beyond[best]] if best in beyond and len(found) < len(rates) + BEYOND else []


def best_rates(runs: list[Run], seed: int) -> list[float]:
    """The search's best, and what has done better than it in whole runs of the seed."""
    found = tried(runs, seed)
    best = min(found, key=lambda lr: found[lr])
    by_rate = {run["lr"]: kl([run]) for run in whole(runs) if run["seed"] == seed}
    return [best, *(lr for lr, value in by_rate.items() if value < by_rate.get(best, -math.inf))]
