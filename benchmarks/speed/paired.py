"""Times that are compared, never reported: contenders take turns, and each is set against the first of its round."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch


def ratios(
    steps: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Median and quartiles of each contender's time over the first one's, round by round.

    Every second round goes backwards, so that whoever comes after a slow one isn't always the same. On a machine that
    others use, `time.process_time` leaves out the time that they have.
    """
    names = list(steps)
    for name in names:  # the first call allocates and plans
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            started = clock()
            steps[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(clock() - started)
    return {name: _spread([a / b for a, b in zip(times[name], times[names[0]], strict=True)]) for name in names}


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def machine() -> dict[str, Any]:
    """What a ratio depends on."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "transformers")},
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
