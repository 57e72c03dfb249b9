"""The file that keeps the runs of one setting and contender."""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

BEYOND = 3  # learning rates that a search goes beyond the given ones, at most
# What results of one name must have in common, where a file says it.
HEAD = ("setting", "training", "search_share", "text", "tasks", "work")


class Results:
    """{"setting", "training", "work", "versions", "search": [...], "runs": [...], "other_rates": [...]}.

    "versions" are those of the first runs; a run with others has its own. "other_rates" holds whole runs with a
    learning rate that others do better with, or have more runs of.

    Raises:
        SystemExit: if the file is there and of something else.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {**head, "search": [], "runs": []}
        self._versions = head.get("versions")
        if path.exists():
            found = json.loads(path.read_text())
            # A file without it was written before the model and its text were noted.
            differ = [key for key in HEAD if found.get(key, head.get(key) if key == "work" else None) != head.get(key)]
            if differ:
                raise SystemExit(
                    f"{path} is of another {' and '.join(differ)} (work: the model's weights and the tokens); name "
                    "another folder with --results, or give the setting another name."
                )
            self.data = found

    def add(self, kind: str, figures: dict[str, Any]) -> None:
        """Keep a run, and write the file, which another runner may have written to meanwhile."""
        self._read()
        if self.has(kind, figures["seed"], figures.get("lr")):
            return
        if self._versions != self.data.get("versions"):
            figures = {**figures, "versions": self._versions}
        self.data[kind].append(figures)
        self.data[kind].sort(key=lambda run: (run["seed"], run.get("lr") or 0))
        self._write()

    def keep(self, lr: float | None = None) -> None:
        """Leave under "runs" those of a learning rate: of most runs, and of these the best, where none is given."""
        self._read()
        by_rate: dict[float | None, list[dict[str, Any]]] = {}
        for run in sorted(self.whole_runs(), key=lambda run: run["seed"]):
            by_rate.setdefault(run.get("lr"), []).append(run)
        if lr is None:
            lr = min(by_rate, key=lambda rate: (-len(by_rate[rate]), statistics.mean(map(_kl, by_rate[rate]))))
        self.data["runs"] = by_rate.pop(lr)
        self.data.pop("other_rates", None)
        if by_rate:
            self.data["other_rates"] = [run for runs in by_rate.values() for run in runs]
        self._write()

    def whole_runs(self) -> list[dict[str, Any]]:
        """Of all learning rates."""
        return self.data["runs"] + self.data.get("other_rates", [])

    def _read(self) -> None:
        if self.path.exists():
            self.data = json.loads(self.path.read_text())

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        temporary.replace(self.path)

    def has(self, kind: str, seed: int, lr: float | None) -> bool:
        """Whether a run is there."""
        runs = self.whole_runs() if kind == "runs" else self.data[kind]
        return any(run["seed"] == seed and run.get("lr") == lr for run in runs)

    def next_rates(self, rates: list[float], seed: int) -> list[float]:
        """What the search has still to try: `rates`, then what lies beyond them while the best is at an end."""
        tried = self._tried(seed)
        if missing := [lr for lr in rates if lr not in tried]:
            return missing
        best = self.best_lr(seed)
        beyond = {min(tried): best / 2, max(tried): best * 2}
        return [beyond[best]] if best in beyond and len(tried) < len(rates) + BEYOND else []

    def best_lr(self, seed: int) -> float:
        """Of the search."""
        tried = self._tried(seed)
        return min(tried, key=lambda lr: tried[lr])

    def best_lrs(self, seed: int) -> list[float]:
        """The same, and those that have done better than it in whole runs of the seed, which the search fell short of.

        They have as many seeds as it before `keep` chooses between them.
        """
        best = self.best_lr(seed)
        whole = {run["lr"]: _kl(run) for run in self.whole_runs() if run["seed"] == seed}
        return [best, *(lr for lr, kl in whole.items() if kl < whole.get(best, -math.inf))]

    def _tried(self, seed: int) -> dict[float, float]:
        """KL by learning rate."""
        return {run["lr"]: _kl(run) for run in self.data["search"] if run["seed"] == seed}


def _kl(run: dict[str, Any]) -> float:
    """What has diverged is worse than all else."""
    return run["kl"] if math.isfinite(run["kl"]) else math.inf
