"""Peak memory of calibration by blocks from disk, against the size of one decoder layer.

Makes a Llama of random weights in bfloat16, one shard a decoder layer, calibrates it from disk with a few steps on a
few tokens, and records the peak of the resident memory above that after the imports.

    MALLOC_MMAP_THRESHOLD_=1048576 python benchmarks/memory/blocks.py

The variable makes glibc give freed tensors back to the system at once; without it, freed memory that it keeps counts
too. What is measured is memory: the weights, and so the adapter, mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dlqat import DLQATConfig, calibrate_from_disk

RESULTS = Path(__file__).parents[1] / "results" / "blocks.json"
MODEL = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000,
}  # fmt: skip
TOKENS, STEPS = 128, 2


def make_model(folder: Path, config: LlamaConfig) -> dict[str, int]:
    """Write the model shard by shard; returns its parameters, in all and in one decoder layer."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(
            f"model-{parts[2]}.safetensors" if "layers" in parts else "model-rest.safetensors", []
        ).append(name)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for shard, names in shards.items():
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name in names
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    layer = sum(shape.numel() for name, shape in shapes.items() if name.startswith("model.layers.0."))
    return {"parameters": sum(shape.numel() for shape in shapes.values()), "layer_parameters": layer}


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this script needs Linux.")


def measure(folder: Path, config: DLQATConfig) -> dict[str, Any]:
    """Calibrate from disk in float32; returns the peak above the start, and the sizes it is made of."""
    ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as output:
        before, started = resident("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        result = calibrate_from_disk(
            folder, config, [{"input_ids": ids}], Path(output) / "adapter", steps=STEPS, dtype=torch.float32
        )
        peak = resident("VmHWM") - before
        adapter = load_file(Path(output) / "adapter" / "adapter_model.safetensors")
    return {
        "peak_above_start": peak,
        "caches": 2 * ids.numel() * MODEL["hidden_size"] * torch.float32.itemsize,
        "adapter": sum(tensor.nbytes for tensor in adapter.values()),
        "decoder_layers": len(result.blocks),
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    """Make the model, calibrate it once, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULTS)
    args = parser.parse_args()
    config = LlamaConfig(**MODEL, dtype="bfloat16")
    adapter = DLQATConfig(bits=3, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as room:
        sizes = make_model(Path(room) / "model", config)
        run = measure(Path(room) / "model", adapter)
    layer = {name: sizes["layer_parameters"] * size for name, size in (("bfloat16", 2), ("float32", 4))}
    result = {
        "model": {**MODEL, **sizes},
        "config": {"bits": 3, "group_size": adapter.group_size, "r": adapter.r, "init": adapter.init},
        "tokens": TOKENS,
        "steps": STEPS,
        "dtype": "float32",
        "MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "bytes": {"layer_bfloat16": layer["bfloat16"], "layer_float32": layer["float32"], **run},
        # Peak memory, in decoder layers of the computation's dtype.
        "layers_beside_caches": round((run["peak_above_start"] - run["caches"]) / layer["float32"], 3),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=2) + "\n")
    peak, count = run["peak_above_start"] / 2**20, result["layers_beside_caches"]
    print(f"peak {peak:.0f} MiB = caches + {count} layers in float32 -> {args.result}")


if __name__ == "__main__":
    main()
