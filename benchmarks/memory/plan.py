"""Which batch fits which card: prints the tables of docs/memory.md, from `estimate_memory`.

    python benchmarks/memory/plan.py

Sizes are in GiB. A card counts with what is left of it beside 1 GiB for the CUDA context and the allocator's gaps.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache

import torch
from transformers import LlamaConfig
from transformers.utils import logging as transformers_logging

from peft_dlqat import DLQATConfig, estimate_memory
from peft_dlqat.memory import MemoryEstimate

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


@cache
def estimate(model: str, storage: str, batch: int, length: int) -> MemoryEstimate:
    """r = 16, groups of 128, AdamW, bfloat16, gradient checkpointing."""
    config = DLQATConfig(bits=2 if storage == "int2" else 3, r=16, storage=storage, task_type="CAUSAL_LM")
    return estimate_memory(config, LlamaConfig(vocab_size=32000, **MODELS[model]), batch, length)


def largest_batch(one: MemoryEstimate, two: MemoryEstimate, card: float) -> int:
    """Of a step whose memory grows by as much with each sequence as from the first to the second."""
    room = (card - RESERVED) * GIB - one.total
    return 0 if room < 0 else 1 + int(room // (two.total - one.total))


def main() -> None:
    """Print both tables."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    parts = ["frozen", "grid", "rest", "adapter", "gradients", "optimizer", "activations", "head", "temporaries"]
    print("One sequence of 1024 tokens, GiB:\n")
    print(f"| model | storage | {' | '.join(parts)} | total |")
    print(f"|---|---|{'---:|' * (len(parts) + 1)}")
    first = {}
    for model in MODELS:
        for storage in STORAGES:
            first[model, storage] = found = estimate(model, storage, 1, LENGTHS[0])
            sizes = " | ".join(f"{getattr(found, part) / GIB:.2f}" for part in parts)
            print(f"| {model} | {storage} | {sizes} | {found.total / GIB:.1f} |")
    print(f"\nThe largest batch by sequence length ({' / '.join(map(str, LENGTHS))} tokens):\n")
    print(f"| model | storage | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print(f"|---|---|{'---|' * len(CARDS)}")
    for model in MODELS:
        # The storage has no part in what grows with the batch.
        steps = [tuple(estimate(model, STORAGES[0], batch, length) for batch in (1, 2)) for length in LENGTHS]
        for storage in STORAGES:
            saved = steps[0][0].total - first[model, storage].total
            cells = []
            for card in CARDS:
                fits = [largest_batch(one, two, card + saved / GIB) for one, two in steps]
                cells.append(" / ".join(str(batch) if batch else "-" for batch in fits))
            print(f"| {model} | {storage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
