"""Tokens a second while generating on a CPU, with the adapter active, over LoRA's active.

    python benchmarks/speed/generate.py [--quick]
    python benchmarks/speed/generate.py --model FOLDER [--gguf_file NAME]    also a model of your own

The models are LLaMAs of random weights, 4 layers, float32; r = 16, 3 bits, groups of 128. One prompt of 16 tokens,
greedy. CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import machine, ratios
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_dlqat import DLQATConfig, pack_weights
from peft_dlqat.layer import DLQATLayer

RESULTS = Path(__file__).parents[1] / "results" / "generate.json"
SIZES = {"hidden 512": 512, "hidden 1024": 1024}
OURS: dict[str, dict[str, Any]] = {"DL-QAT": {}, "DL-QAT, int4 storage": {"storage": "int4"}}


def base(size: int | None, model: str, gguf_file: str | None) -> Any:
    """The same weights for everybody."""
    torch.manual_seed(0)
    if size is None:
        return AutoModelForCausalLM.from_pretrained(model, gguf_file=gguf_file, dtype=torch.float32)
    shape = {"hidden_size": size, "intermediate_size": 4 * size, "num_hidden_layers": 4, "num_attention_heads": 8}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=4096, **shape), dtype=torch.float32)


def adapted(made: Any, **settings: Any) -> Any:
    """With DL-QAT or, without settings, LoRA, on all linear layers."""
    if not settings:
        return get_peft_model(made, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    config = DLQATConfig(bits=3, r=16, init="minmax", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(made, config).eval()
    pack_weights(model)
    return model


def generating(model: Any, new_tokens: int) -> Callable[[], object]:
    """So many tokens after one prompt."""
    ids = torch.randint(3, 1000, (1, 16), generator=torch.Generator().manual_seed(0))
    arguments = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors and of the weights that its layers keep."""
    kept = sum(layer._kept_weight.nbytes for layer in model.modules() if isinstance(layer, DLQATLayer))
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + kept


def main() -> None:
    """Time all models, and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="", help="a folder of a model, beside the random ones")
    parser.add_argument("--gguf_file", help="of that folder")
    parser.add_argument("--results", type=Path, help="default: the committed file, or with --quick one in outputs/")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(never calibrated|does not divide)")
    sizes: dict[str, int | None] = {"hidden 128": 128} if args.quick else dict(SIZES)
    if args.model:
        sizes[args.gguf_file or Path(args.model).name] = None
    path = args.results or (Path("outputs", "quick", RESULTS.name) if args.quick else RESULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, size in sizes.items():
        made = {"LoRA": {}, **{key: {"zero_point": "integer", **settings} for key, settings in OURS.items()}}
        models = {key: adapted(base(size, args.model, args.gguf_file), **kwargs) for key, kwargs in made.items()}
        tokens = 4 if args.quick else 16
        steps = {key: generating(model, tokens) for key, model in models.items()}
        found = ratios(steps, 2 if args.quick else args.rounds, clock=time.process_time)
        rows[name] = {
            "tokens_a_second_ratio": {key: round(1 / value["median"], 3) for key, value in found.items()},
            "time_ratio": found,
            "bytes": {key: weight_bytes(model) for key, model in models.items()},
        }
        print(name, rows[name]["tokens_a_second_ratio"], flush=True)
        content = {"command": "python benchmarks/speed/generate.py", "machine": machine(), "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
