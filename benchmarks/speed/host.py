"""The host's time for one linear layer as a GPU would be given it, against PEFT's LoRA: kernels are no-ops.

    python benchmarks/speed/host.py [--quick]

A GPU waits for the host where there are few tokens. What is timed is the thread's processor time of Python and torch,
on a layer so small that arithmetic takes none. The launch of a Triton kernel is not in it, as none is launched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from paired import machine
from peft import LoraConfig, get_peft_model

from peft_dlqat import DLQATConfig, pack_weights
from peft_dlqat.quant import dispatch, nvidia

RESULTS = Path(__file__).parents[1] / "results" / "host.json"
SIZE, RANK = 64, 16
PASSES = ("forward without gradient", "forward", "forward and backward")
OURS: dict[str, dict[str, Any]] = {
    "DL-QAT": {"zero_point": "integer"},
    "DL-QAT, symmetric": {"zero_point": "none"},
    "DL-QAT, int4 storage": {"zero_point": "integer", "storage": "int4"},
    "DL-QAT, lowrank gradient": {"zero_point": "integer", "gradient": "lowrank", "magnitude": "row"},
}


class _NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **_: None


@contextmanager
def without_kernels() -> Iterator[None]:
    """Take the GPU's way, with kernels that do nothing."""
    nothing = SimpleNamespace(quantize=_NoKernel(), weight_grads=_NoKernel())
    with patch.object(nvidia, "kernels", nothing), patch.object(dispatch, "_on_nvidia", lambda _: True):
        yield


def layer(**settings: Any) -> Any:
    """One bfloat16 layer, with DL-QAT or, without settings, LoRA."""
    base = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE, bias=False)).bfloat16()
    if settings:
        model = get_peft_model(base, DLQATConfig(target_modules=["0"], group_size=32, r=RANK, **settings))
        pack_weights(model)
    else:
        config = LoraConfig(target_modules=["0"], r=RANK)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)  # type: ignore[assignment]
    return model.base_model.model[0].train()


def work(adapted: Any, what: str) -> Callable[[], object]:
    """One pass of a layer."""
    x = torch.randn(1, SIZE, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(1, SIZE, dtype=torch.bfloat16)
    tensors = [x, *(parameter for parameter in adapted.parameters() if parameter.requires_grad)]

    def run() -> None:
        if what == PASSES[2]:
            for tensor in tensors:
                tensor.grad = None
            adapted(x).backward(grad)
        else:
            with torch.set_grad_enabled(what == PASSES[1]):
                adapted(x)

    return run


def compare(what: str, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of each, and the median over rounds of its time over LoRA's; they take turns."""
    steps = {"LoRA": work(layer(), what), **{name: work(layer(**kwargs), what) for name, kwargs in OURS.items()}}
    times: dict[str, list[int]] = {name: [] for name in steps}
    for index in range(rounds):
        for name in steps if index % 2 else reversed(steps):
            started = time.thread_time_ns()
            steps[name]()
            times[name].append(time.thread_time_ns() - started)
    return {
        name: {
            "microseconds": round(statistics.median(own) / 1e3),
            "ratio": round(statistics.median(a / b for a, b in zip(own, times["LoRA"], strict=True)), 2),
        }
        for name, own in times.items()
    }


def main() -> None:
    """Time all passes, and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--results", type=Path, help="default: the committed file, or with --quick one in outputs/")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*never calibrated.*")
    torch.set_num_threads(1)
    rows = {}
    for what in PASSES:
        with without_kernels():
            rows[what] = compare(what, 20 if args.quick else args.rounds)
        print(what, {name: row["ratio"] for name, row in rows[what].items()}, flush=True)
    path = args.results or (Path("outputs", "quick", RESULTS.name) if args.quick else RESULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"command": "python benchmarks/speed/host.py", "machine": machine(), "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
