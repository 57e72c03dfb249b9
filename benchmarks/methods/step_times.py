"""Times a training step of every contender against DL-QAT's, in turns in one process, beside an experiment's results.

    python benchmarks/methods/step_times.py benchmarks/methods/experiments/small.json [--model ...] [--tokens ...]

The runs themselves end at different times of a shared machine, and theirs can't be compared.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "speed")]

import run as runner  # noqa: E402
from tables import STEP_TIMES, UNIT, write_tables  # noqa: E402

_ROUNDS = 20


def main() -> None:
    """Time what an experiment trains, setting by setting, and write the tables anew."""
    args = runner.parse(__doc__)
    if not runner.ALLOCATOR.keys() <= os.environ.keys():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**runner.ALLOCATOR, **os.environ})
    experiment = runner.load(args)
    import contenders
    import paired
    import torch
    import training

    torch.set_num_threads(1)
    task = training.load_task(args.model, args.tokens)
    rounds, path = 2 if args.quick else _ROUNDS, args.results / STEP_TIMES
    found = json.loads(path.read_text()) if path.exists() else {}
    jobs = runner.plan(experiment, args.only, args.results)
    settings = list(dict.fromkeys(name for name, _, _ in jobs))
    for setting in settings[:1] if args.quick else settings:
        results = {who: one.data for name, who, one in jobs if name == setting and contenders.is_trained(who)}
        steps: dict[str, Callable[[], object]] = {}
        for who in sorted(results, key=lambda name: name != UNIT):
            config, how = results[who]["setting"], {**results[who]["training"], "calibration_steps": 0}
            how["steps"] = 2 * rounds
            batches = task.calibration(how["batch_size"], 0, 0, "train")
            try:
                prepared = contenders.prepare(who, task.load_model(), config, batches, 0)
            except ImportError as error:
                print(f"{setting} {who} left out: {error}", flush=True)
                continue
            steps[who] = _next(training.steps(task, who, prepared, how, 0, 1e-4))
        found[setting] = {
            "rounds": rounds,
            "machine": paired.machine(),
            "ratios": paired.ratios(steps, rounds),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(setting, {who: times["median"] for who, times in found[setting]["ratios"].items()}, flush=True)
    write_tables(args.results)


def _next(steps: Iterator[Any]) -> Callable[[], object]:
    return lambda: next(steps)


if __name__ == "__main__":
    main()
