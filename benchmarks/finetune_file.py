"""A quantized file, fine-tuned inside its own blocks, beside what else is done with such a file.

    python benchmarks/finetune_file.py FILE.gguf --train TEXT --test TEXT [--steps 100] [--seeds 0 1]

Four models, each by its perplexity on the first `--test_tokens` of a text that nobody trains on:

- the file as it is;
- `dlqat`: an adapter trained by `load_quantized`, and the file that is written then, of the same size;
- `lora`: LoRA beside the decoded weights in full precision, as large as the 16-bit model: the limit;
- `lora, rounded`: the same LoRA merged, and rounded to the file's types by llama.cpp's own function.

Both train on the next tokens of the same rows, with the plain Trainer and LoRA's usual rate; nothing is tuned. Each
run is kept as it ends, and not repeated. `--report` prints the table.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import math
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from runs import keep
from torch import nn
from training import plain_arguments
from transformers import AutoModelForCausalLM, Trainer

from peft_dlqat import DLQATConfig, export_model
from peft_dlqat.formats.gguf_file import GGUFFile
from peft_dlqat.large.load_quantized import load_quantized

RESULTS = Path(__file__).resolve().parent / "results" / "finetune_file.json"
ROW, BATCH, RATE, RANK = 512, 2, 2e-4, 16


def rows(tokenizer: Any, path: Path, most: int | None = None) -> torch.Tensor:
    """A text in rows of tokens, int64 [n, ROW]."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    ids = ids[:most] if most else ids
    return ids[: len(ids) // ROW * ROW].view(-1, ROW)


@torch.no_grad()
def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    """Of each row by itself."""
    model.eval()
    losses = [
        nn.functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1].float(), row[1:]).item() for row in ids
    ]
    return round(math.exp(sum(losses) / len(losses)), 4)


def train(model: nn.Module, ids: torch.Tensor, steps: int, seed: int) -> float:
    """With the Trainer's own AdamW, schedule and clipping; returns the seconds."""
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = plain_arguments(folder, RATE, steps, BATCH, seed)
        started = time.time()
        Trainer(model=model, args=arguments, train_dataset=data).train()
    return round(time.time() - started, 1)


def run_dlqat(file: Path, texts: dict[str, torch.Tensor], steps: int, seed: int) -> dict[str, Any]:
    """Inside the file's blocks; the written file is asked of llama.cpp, if that is installed."""
    torch.manual_seed(seed)
    config = DLQATConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM")
    model, _ = load_quantized(file, config, dtype=torch.float32)
    seconds = train(model, texts["train"], steps, seed)
    figures = {"perplexity": perplexity(model, texts["test"]), "seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        found = export_model(model, Path(folder) / "out", "gguf")
        figures["bytes"] = (Path(folder) / "out" / "model.gguf").stat().st_size
        assert found is not None
        figures["engines"] = {row.engine: row.kl for row in found.figures}
    return figures


def run_lora(file: Path, texts: dict[str, torch.Tensor], steps: int, seed: int) -> dict[str, Any]:
    """Beside the decoded weights; then merged, and rounded as the file is."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    base.is_quantized = False  # decoded by now, which the Trainer does not know
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    seconds = train(model, texts["train"], steps, seed)
    figures = {"perplexity": perplexity(model, texts["test"]), "seconds": seconds}
    adapted = [name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if ".lora_A.d" in name]
    adapted = [name.removeprefix("base_model.model.") for name in adapted]
    merged = model.merge_and_unload(safe_merge=True)
    types, content = types_of(file), GGUFFile.open(file)
    for name in adapted:
        weight = merged.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(rounded(weight, content.tensors[types[f"{name}.weight"]].type))
    return {**figures, "rounded": perplexity(merged, texts["test"])}


def types_of(file: Path) -> dict[str, str]:
    """The file's names of weights, by the model's."""
    model, _ = load_quantized(file, DLQATConfig(r=1, task_type="CAUSAL_LM"), dtype=torch.float32)
    return dict(model.get_base_model().origin.names)


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight [out, in] in one of GGML's types, by llama.cpp's rounding."""
    import gguf

    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("llama.cpp's rounding needs xllamacpp: pip install xllamacpp")
    function = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    count, columns = weight.shape
    source = np.ascontiguousarray(weight.detach().float().numpy())
    found = np.zeros((count, columns // block * size), dtype=np.uint8)
    places = (ctypes.c_void_p(values.ctypes.data) for values in (source, found))
    numbers = (ctypes.c_int64(value) for value in (0, count, columns))
    written = function(int(number), *places, *numbers, None)  # without an importance matrix
    assert written == found.nbytes
    return torch.from_numpy(gguf.dequantize(found, number))


def report(runs: list[dict[str, Any]]) -> str:
    """A row a model: perplexity by seed, and the share of LoRA's gain."""
    lines = []
    for file in dict.fromkeys(run["file"] for run in runs):
        found = {(run["model"], run["seed"]): run for run in runs if run["file"] == file}
        seeds = sorted({seed for name, seed in found if name != "file"})
        start = found["file", 0]
        lines += [f"{file}, {start['bytes'] / 1e6:.1f} MB", "", "| | perplexity | of LoRA's gain |", "|---|---|---|"]
        lines.append(f"| the file as it is | {start['perplexity']:.2f} | |")
        for label, name, key in (
            ("DL-QAT, the same file's size", "dlqat", "perplexity"),
            ("LoRA in full precision", "lora", "perplexity"),
            ("LoRA, merged and rounded", "lora", "rounded"),
        ):
            have = [seed for seed in seeds if (name, seed) in found and ("lora", seed) in found]
            values = [found[name, seed][key] for seed in have]
            limits = [found["lora", seed]["perplexity"] for seed in have]
            gains = [
                (start["perplexity"] - value) / (start["perplexity"] - limit)
                for value, limit in zip(values, limits, strict=True)
            ]
            lines.append(
                f"| {label} | {' / '.join(f'{value:.2f}' for value in values)} | "
                f"{' / '.join(f'{gain:.0%}' for gain in gains)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--train", type=Path, help="text to train on")
    parser.add_argument("--test", type=Path, help="text of which the perplexity is")
    parser.add_argument("--test_tokens", type=int, default=2**15)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", default=["dlqat", "lora"], choices=["dlqat", "lora"])
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and run nothing")
    args = parser.parse_args()
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if args.report:
        print(report(runs))
        return
    if args.file is None or args.train is None or args.test is None:
        parser.error("FILE, --train and --test are needed")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    start, tokenizer = load_quantized(args.file, DLQATConfig(r=1, task_type="CAUSAL_LM"), dtype=torch.float32)
    texts = {"train": rows(tokenizer, args.train), "test": rows(tokenizer, args.test, args.test_tokens)}
    digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in texts.values())).hexdigest()[:16]
    same = {"file": args.file.name, "tokens": digest, "steps": args.steps}
    size = args.file.stat().st_size
    as_it_is = {**same, "model": "file", "seed": 0}
    keep(RESULTS, runs, as_it_is, lambda: {"perplexity": perplexity(start, texts["test"]), "bytes": size})
    for seed in args.seeds:
        for name, run in (("dlqat", run_dlqat), ("lora", run_lora)):
            if name in args.models:
                what = {**same, "model": name, "seed": seed}
                keep(RESULTS, runs, what, partial(run, args.file, texts, args.steps, seed))
    print(report(runs))


if __name__ == "__main__":
    main()
