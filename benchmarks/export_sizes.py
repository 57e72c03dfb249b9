"""Sizes of exported models, measured from their files: bits per adapted weight, and the whole file against bfloat16.

python benchmarks/export_sizes.py                       # the embedded model, all formats: a Markdown table
python benchmarks/export_sizes.py --model <folder> --bits 3 --group_size 64
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import warnings
from math import prod
from pathlib import Path

from peft import get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from peft_dlqat import DLQATConfig, export_formats, export_model

EMBEDDED = Path(__file__).parents[1] / "examples" / "embedded" / "model"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group_size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--zero_point", nargs="+", default=["none", "integer", "float"])
    arguments = parser.parse_args()
    print("| bits | group | zero point | format | stored as | bits a weight | MB | of bfloat16 |")
    print("|---|---|---|---|---|---|---|---|")
    for bits in arguments.bits:
        for group_size in arguments.group_size:
            for zero_point in arguments.zero_point:
                settings = {"bits": bits, "group_size": group_size, "zero_point": zero_point}
                for row in rows(arguments.model, settings):
                    print("| " + " | ".join(row) + " |", flush=True)


def rows(model_id: str, settings: dict) -> list[tuple[str, ...]]:
    """One row a format that holds the grid."""
    config = DLQATConfig(**settings, init="minmax", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_id, dtype="bfloat16")
    parameters, head = base.num_parameters(), base.get_output_embeddings()
    linear = {
        name: layer for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    weights = {name: layer.weight.numel() for name, layer in linear.items()}
    model = get_peft_model(base, config)
    found = []
    for held in export_formats(config).rows:
        if held.problem or held.format == "dense":
            continue
        with tempfile.TemporaryDirectory() as room, contextlib.redirect_stdout(io.StringIO()):
            folder = Path(room) / "out"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it was not trained, which makes no difference to sizes
                export_model(model, folder, held.format, verify=False)
            stored = gguf_bytes(folder) if held.format == "gguf" else safetensors_bytes(folder, set(weights))
            size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
        bits = 8 * stored / sum(weights.values())
        grid = [str(settings["bits"]), str(settings["group_size"]), settings["zero_point"]]
        share = size / (2 * parameters)
        found.append((*grid, held.format, held.stored, f"{bits:.2f}", f"{size / 1e6:.2f}", f"{share:.0%}"))
    return found


def safetensors_bytes(folder: Path, modules: set[str]) -> int:
    """Bytes of all tensors of some modules, biases left out."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                module, _, leaf = name.rpartition(".")
                if module in modules and leaf != "bias":
                    entry = tensors.get_slice(name)
                    total += BYTES[entry.get_dtype()] * prod(entry.get_shape())
    return total


def gguf_bytes(folder: Path) -> int:
    """Bytes of the quantized tensors."""
    import gguf

    plain = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
    return sum(
        int(t.n_bytes) for t in gguf.GGUFReader(next(folder.glob("*.gguf"))).tensors if t.tensor_type not in plain
    )


if __name__ == "__main__":
    main()
