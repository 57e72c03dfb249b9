"""Which batch fits which card: prints the tables of docs/memory.md, from `estimate_memory`.

    python benchmarks/memory/plan.py          # minutes; with names of models, such as 7B, only these

Sizes are in GiB. A card counts with what is left of it beside 1 GiB for the CUDA context and the allocator's gaps.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig
from transformers.utils import logging as transformers_logging

from peft_dlqat import DLQATConfig, estimate_memory

MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
STORAGES = ("full", "int8", "int4", "int2")
LENGTHS = (1024, 2048, 4096)
CARDS = (24, 48, 80)
RESERVED = 1
GIB = 2**30


# Between these batches memory is taken for linear. It is convex, so this errs upwards; beyond them it is linear.
BATCHES = (1, 2, 4, 16, 64)


def config(storage: str) -> DLQATConfig:
    return DLQATConfig(bits=2 if storage == "int2" else 3, r=16, storage=storage, task_type="CAUSAL_LM")


def shapes(model: str) -> LlamaConfig:
    return LlamaConfig(vocab_size=32000, **MODELS[model])


def step_bytes(model: str, length: int) -> list[int]:
    """What a step takes beside what stays, by batch; the storage has no part in it."""
    found = [estimate_memory(config("full"), shapes(model), batch, length) for batch in BATCHES]
    return [part.total - part.static for part in found]


def largest_batch(steps: list[int], room: float) -> int:
    """The largest batch whose step fits into `room` bytes."""
    if steps[0] > room:
        return 0
    fits = max(index for index, step in enumerate(steps) if step <= room)
    low = min(fits, len(steps) - 2)
    slope = (steps[low + 1] - steps[low]) / (BATCHES[low + 1] - BATCHES[low])
    return int(BATCHES[low] + (room - steps[low]) / slope)


def main(models: list[str]) -> None:
    """Print both tables."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    parts = ["frozen", "grid", "rest", "adapter", "gradients", "optimizer", "update"]
    parts += ["activations", "head", "temporaries"]
    print("One sequence of 1024 tokens, GiB:\n")
    print(f"| model | storage | {' | '.join(parts)} | total |")
    print(f"|---|---|{'---:|' * (len(parts) + 1)}")
    static = {}
    for model in models:
        for storage in STORAGES:
            found = estimate_memory(config(storage), shapes(model), 1, LENGTHS[0])
            static[model, storage] = found.static
            sizes = " | ".join(f"{getattr(found, part) / GIB:.2f}" for part in parts)
            print(f"| {model} | {storage} | {sizes} | {found.total / GIB:.1f} |")
    print(f"\nThe largest batch by sequence length ({' / '.join(map(str, LENGTHS))} tokens):\n")
    print(f"| model | storage | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print(f"|---|---|{'---|' * len(CARDS)}")
    for model in models:
        steps = [step_bytes(model, length) for length in LENGTHS]
        for storage in STORAGES:
            rooms = [(card - RESERVED) * GIB - static[model, storage] for card in CARDS]
            cells = [[largest_batch(by_batch, room) or "-" for by_batch in steps] for room in rooms]
            print(f"| {model} | {storage} | {' | '.join(' / '.join(map(str, cell)) for cell in cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
