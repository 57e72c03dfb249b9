"""Peak memory of `load_packed` on a random model: prints the full model's bytes, the result's, and the peak's.

python loading_memory.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from conftest import lm_batches, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dlqat import DLQATConfig, load_packed

CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=8,
    dtype="float32",
)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main(folder: Path) -> None:
    if len(sys.argv) == 2:  # a process of its own makes the model, so that its memory does not count
        import subprocess

        subprocess.run([sys.executable, __file__, str(folder), "make"], check=True)
    else:
        LlamaForCausalLM(CONFIG).save_pretrained(folder)
        return
    config = DLQATConfig(bits=3, init="minmax", storage="int4", task_type="CAUSAL_LM")
    # What the libraries load once.
    tiny_model().save_pretrained(folder / "tiny")
    load_packed(folder / "tiny", config)(**lm_batches(1)[0])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    model = load_packed(folder, config)
    peak = resident("VmHWM") - before
    with torch.device("meta"):
        full = sum(parameter.nbytes for parameter in LlamaForCausalLM(CONFIG).parameters())
    print(full, sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), peak)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
