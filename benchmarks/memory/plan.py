"""Which batch fits which card: prints the tables of docs/memory.md and docs/laptop.md, from `estimate_memory`.

    python benchmarks/memory/plan.py          # minutes; with names of models, such as 7B, only these

Sizes are in GiB. A card counts with what is left of it beside 1 GiB for the CUDA context and the allocator's gaps.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.utils import logging as transformers_logging

from peft_dlqat import DLQATConfig, estimate_memory
from peft_dlqat.large.memory import MemoryEstimate

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
# Of small models, as they are published: Qwen3-0.6B, Llama-3.2-1B and 3B.
SMALL_MODELS = {
    "0.6B": Qwen3Config(
        **{"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "1B": LlamaConfig(
        **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    ),
    "3B": LlamaConfig(
        **{"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "7B": LlamaConfig(vocab_size=32000, **MODELS["7B"]),
}
LAPTOP = {
    "groups of 128, full": (("transformers", None, 4), {}),
    "groups of 128, int4": (("transformers", None, 4), {"storage": "int4"}),
    "Q4_0, int4": (("llama.cpp", "Q4_0"), {"storage": "int4"}),
    "Q3_K, int4": (("llama.cpp", "Q3_K"), {"storage": "int4"}),
    "Q3_K, int4, one m a row": (("llama.cpp", "Q3_K"), {"storage": "int4", "magnitude": "row"}),
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


@cache
def estimate(model: str, storage: str, batch: int, length: int) -> MemoryEstimate:
    """Of a step."""
    return estimate_memory(config(storage), shapes(model), batch, length)


def step_bytes(model: str, length: int) -> list[int]:
    """What a step takes beside what stays, by batch; the storage has no part in it."""
    found = [estimate(model, "full", batch, length) for batch in BATCHES]
    return [part.total - part.static for part in found]


def largest_batch(steps: list[int], room: float) -> int:
    """The largest batch whose step fits into `room` bytes."""
    if steps[0] > room:
        return 0
    fits = max(index for index, step in enumerate(steps) if step <= room)
    low = min(fits, len(steps) - 2)
    slope = (steps[low + 1] - steps[low]) / (BATCHES[low + 1] - BATCHES[low])
    return int(BATCHES[low] + (room - steps[low]) / slope)


def parts_table(models: list[str]) -> list[str]:
    """What a step with one sequence takes, in Markdown, one row a storage."""
    parts = ["frozen", "scales_and_zeros", "rest", "adapter", "gradients", "optimizer", "update"]
    parts += ["activations", "head", "temporaries"]
    lines = [
        f"| model | storage | {' | '.join(parts).replace('_', ' ')} | total |",
        f"|---|---|{'---:|' * (len(parts) + 1)}",
    ]
    for model in models:
        for storage in STORAGES:
            found = estimate(model, storage, 1, LENGTHS[0])
            sizes = " | ".join(f"{getattr(found, part) / GIB:.2f}" for part in parts)
            lines.append(f"| {model} | {storage} | {sizes} | {found.total / GIB:.1f} |")
    return lines


def batch_table(models: list[str]) -> list[str]:
    """The largest batches that fit, in Markdown, one row a storage."""
    lines = [f"| model | storage | {' | '.join(f'{card} GB' for card in CARDS)} |", f"|---|---|{'---|' * len(CARDS)}"]
    for model in models:
        steps = [step_bytes(model, length) for length in LENGTHS]
        for storage in STORAGES:
            static = estimate(model, storage, 1, LENGTHS[0]).static
            rooms = [(card - RESERVED) * GIB - static for card in CARDS]
            cells = [[largest_batch(by_batch, room) or "-" for by_batch in steps] for room in rooms]
            lines.append(f"| {model} | {storage} | {' | '.join(' / '.join(map(str, cell)) for cell in cells)} |")
    return lines


def laptop_row(model: str) -> str:
    """What a step with one sequence takes, in Markdown, one cell a setting."""
    totals = [
        estimate_memory(
            DLQATConfig.for_engine(*engine, r=16, task_type="CAUSAL_LM", **settings),
            SMALL_MODELS[model],
            1,
            LENGTHS[0],
        ).total
        for engine, settings in LAPTOP.values()
    ]
    return f"| {model} | {' | '.join(f'{total / GIB:.1f}' for total in totals)} |"


def main(models: list[str]) -> None:
    """Print all tables."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("One sequence of 1024 tokens, GiB:\n", *parts_table(models), sep="\n")
    print(f"\nThe largest batch by sequence length ({' / '.join(map(str, LENGTHS))} tokens):\n")
    print(*batch_table(models), sep="\n")
    print(f"\n| model | {' | '.join(LAPTOP)} |", f"|---|{'---:|' * len(LAPTOP)}", sep="\n")
    print(*map(laptop_row, SMALL_MODELS), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
