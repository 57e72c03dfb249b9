"""A training step of a whole model on a CPU, in time and memory, against PEFT's LoRA on the same float32 base.

    python benchmarks/speed/model.py [--quick]

The model is a LLaMA of 122 M random weights, a step 2048 tokens (4 x 512). A layer of each contender of this package
is checked first, as in layer.py. Time: all contenders in one process, taking turns. Memory: each in a process of its
own, the peak of what is resident while it trains, once the base is loaded and the adapter made; the C library is told
to give large blocks back, so that only what is used counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from eager import PEERS, replace_layers
from layer import Work, check, kept_bytes, ours
from paired import machine, ratios
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dlqat import DLQATConfig, pack_weights

RESULTS = Path(__file__).parents[1] / "results" / "model.json"
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 8192,
}  # fmt: skip
QUICK = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4}  # fmt: skip
BATCH, LENGTH, R = 4, 512, 16
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "DL-QAT": {},
    "DL-QAT, int8 storage": {"storage": "int8"},
    "DL-QAT, int4 storage": {"storage": "int4"},
    "DL-QAT, bf16 gradient, int8 storage": {"gradient": "bf16", "storage": "int8"},
    "DL-QAT, lowrank gradient, int8 storage": {"gradient": "lowrank", "magnitude": "row", "storage": "int8"},
    "DL-QAT, lowrank gradient, int4 storage": {"gradient": "lowrank", "magnitude": "row", "storage": "int4"},
}


def make(name: str, shape: dict[str, int]) -> nn.Module:
    """The base model of random weights, with the contender's adapter on all linear layers but the head."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=LENGTH, attn_implementation="sdpa"))
    if name in PEERS:
        return replace_layers(base, PEERS[name], 3, 128, R)
    kwargs = CONTENDERS[name]
    if kwargs is None:
        return get_peft_model(base, LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM"))
    # The grid does not matter to time and memory: the one that is found soonest.
    model = get_peft_model(base, DLQATConfig(bits=3, r=R, init="minmax", task_type="CAUSAL_LM", **kwargs))
    pack_weights(model)
    return model


def trainer(model: nn.Module) -> Callable[[], None]:
    """One step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = tokens(model)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def tokens(model: nn.Module) -> torch.Tensor:
    """A batch."""
    return torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))


def resident(field: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def measure_memory(name: str, shape: dict[str, int]) -> dict[str, int]:
    """In this process: what is resident before training, its peak then, and what is kept from forward for backward."""
    model = make(name, shape)
    step = trainer(model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    for _ in range(3):
        step()
    peak = resident("VmHWM")
    return {"before training": before, "peak": peak, "kept for backward": kept_bytes(model, tokens(model))}


def time_all(shape: dict[str, int], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Ratios to LoRA's time, once a layer of each contender is seen to compute what it says."""
    work = Work(n_in=shape["hidden_size"], n_out=shape["hidden_size"], r=R)
    for name, kwargs in CONTENDERS.items():
        if kwargs is not None:
            check(name, ours(work, **kwargs), work)
    models = {name: make(name, shape) for name in (*CONTENDERS, *PEERS)}
    return ratios({name: trainer(model) for name, model in models.items()}, 2 if args.quick else args.rounds)


def main() -> None:
    """Measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-only", action="store_true", help="keep the times that are there")
    parser.add_argument("--memory-of", choices=[*CONTENDERS, *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help="default: the committed file, or with --quick one in outputs/")
    args = parser.parse_args()
    args.results = args.results or (Path("outputs", "quick", RESULTS.name) if args.quick else RESULTS)
    warnings.filterwarnings("ignore", message=".*never calibrated.*")
    shape = QUICK if args.quick else SHAPE
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, shape)))
        return
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    known = json.loads(args.results.read_text())["rows"] if args.memory_only else {}
    rows: dict[str, dict[str, Any]] = {}
    for name in (*CONTENDERS, *PEERS):
        command = [sys.executable, __file__, "--memory-of", name, *(["--quick"] if args.quick else [])]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        rows[name] = {"bytes": json.loads(output.splitlines()[-1])}
        rows[name]["peak_ratio"] = round(rows[name]["bytes"]["peak"] / rows["LoRA"]["bytes"]["peak"], 3)
        print(name, rows[name], flush=True)
    times = {name: row["time_ratio"] for name, row in known.items()} or time_all(shape, args)
    for name, ratio in times.items():
        rows[name]["time_ratio"] = ratio
        print(name, ratio, flush=True)
    parameters = make("LoRA", shape).get_base_model().num_parameters()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": "python benchmarks/speed/model.py", "machine": machine(), "parameters": parameters}
    head |= {"model": shape, "batch": BATCH, "length": LENGTH}
    args.results.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
