"""Memory of opening a quantized file of random weights, and of a training step on it, against the file's size.

    python benchmarks/memory/quantized_file.py [--gigabytes 1] [--types Q2_K Q4_K_M Q8_0]

Each figure is the peak of a process of its own (VmHWM), less what Python, torch and this package take by themselves.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig

from peft_dlqat import DLQATConfig, estimate_memory
from peft_dlqat.formats.gguf_file import GGUFFile
from peft_dlqat.formats.gguf_metadata import architecture, write_metadata
from peft_dlqat.large.checkpoint import empty_model
from peft_dlqat.large.gguf_model import fill, read_config
from peft_dlqat.large.load_quantized import load_quantized
from peft_dlqat.quant.ggml import GGML_TYPES, Half

MIXTURES = {"Q4_K_M": {r"output|attn_v|ffn_down": "Q6_K", "": "Q4_K"}}
WIDTH, INNER, VOCABULARY = 2048, 5632, 32000
TOKENS = 256


def write(path: Path, mixture: str, size: float) -> None:
    """A Llama of TinyLlama's widths, with as many layers as make a file of `size` bytes."""
    types = MIXTURES.get(mixture, {"": mixture})

    def kind(name: str) -> str:
        return next(kind for key, kind in types.items() if re.search(key, name))

    def names(layers: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        config = _config(layers)
        arch = architecture(config)
        state = empty_model(config).state_dict()
        known = arch.tensor_names(config, list(state))
        return {
            known[name]: ("F32" if value.dim() == 1 else kind(known[name]), tuple(value.shape))
            for name, value in state.items()
        }

    def total(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> float:
        return sum(_bytes(kind, shape) for kind, shape in tensors.values())

    one, two = total(names(1)), total(names(2))
    layers = max(1, round((size - one) / (two - one)) + 1)
    config, generator = _config(layers), torch.Generator().manual_seed(0)
    with closing(gguf.GGUFWriter(path=str(path), arch="llama")) as writer:
        write_metadata(writer, config, architecture(config), mixture)
        tensors = names(layers)
        for name, (kind_, shape) in tensors.items():
            if kind_ == "F32":
                writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
            else:
                number = gguf.GGMLQuantizationType[kind_]
                byte_shape = gguf.quant_shape_to_byte_shape(shape, number)
                writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), _bytes(kind_, shape), raw_dtype=number)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for kind_, shape in tensors.values():
            value = torch.ones(shape) if kind_ == "F32" else _blocks(kind_, shape, generator)
            writer.write_tensor_data(value.numpy())
    config.save_pretrained(path.parent)


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(np.prod(shape)) // block * size


def _blocks(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random blocks of small weights."""
    type_, row = GGML_TYPES[kind], GGML_TYPES[kind].row_bytes(shape[1])
    packed = torch.randint(0, 256, (shape[0], row), dtype=torch.uint8, generator=generator)
    blocks = packed.unflatten(-1, (-1, type_.size))
    for place in type_.layout.values():
        if isinstance(place, Half):
            values = (torch.rand(blocks.shape[:2], generator=generator) * 1e-5).half()
            blocks[..., place.at : place.at + 2] = values.unsqueeze(-1).view(torch.uint8)
    return packed


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def measure(path: Path, what: str) -> dict[str, Any]:
    """In a process of its own: the peak of opening without an adapter, of opening with one, or of a step."""
    before = peak()
    if what == "open":
        file = GGUFFile.open(path)
        model = empty_model(read_config(file, path.parent))
        fill(file, file.sha256(), model, torch.bfloat16, "cpu")
        return {"peak": peak() - before}
    config = DLQATConfig(r=16, task_type="CAUSAL_LM")
    model, _ = load_quantized(path, config, base=path.parent, dtype=torch.bfloat16)
    opened = peak() - before
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    if what == "adapter":
        return {"peak": opened, "adapter": trained}
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    estimate = estimate_memory(config, str(path), 1, TOKENS, device="cpu", base=path.parent)
    return {"peak": peak() - before, "estimate": estimate.total}


def main() -> None:
    """Write the files, and measure each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q4_K_M", "Q8_0"])
    parser.add_argument("--what", nargs="+", default=["open", "adapter", "step"])
    parser.add_argument("--measure", nargs=2)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    for mixture in arguments.types:
        with tempfile.TemporaryDirectory() as room:
            path = Path(room) / f"{mixture}.gguf"
            write(path, mixture, arguments.gigabytes * 1e9)
            size = path.stat().st_size
            for what in arguments.what:
                command = [sys.executable, __file__, "--measure", str(path), what]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(done.stderr[-2000:])
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                parts = ", ".join(f"{name} {value / 1e9:.3f} GB" for name, value in found.items())
                print(
                    f"{mixture} {size / 1e9:.3f} GB, {what}: {parts}, peak/file {found['peak'] / size:.2f}", flush=True
                )


if __name__ == "__main__":
    main()
