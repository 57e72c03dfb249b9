"""Measure a model, with an adapter or without, on tasks of the lm-evaluation-harness.

    python examples/evaluate_model.py --tasks small_facts --include_path examples/tasks

asks the small model in examples/embedded/model about small facts, without a download. A model and an adapter from the
Hub or from a disk, on the usual common-sense tasks (or mmlu, or any names that the harness knows):

    python examples/evaluate_model.py --model Qwen/Qwen3-0.6B --dtype bfloat16 --batch_size 16 --tasks commonsense \\
        --adapter outputs/qwen3-3bit/dlqat-3bit

Needs `pip install -e .[eval]`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dlqat.evaluate_tasks import TASK_SETS, evaluate_tasks

EMBEDDED = Path(__file__).parent / "embedded" / "model"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED), help="the base model: a Hub id or a folder")
    parser.add_argument("--adapter", help="an adapter on it: a Hub id or a folder")
    parser.add_argument("--dtype", default="auto", help="of the base model: auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tasks", nargs="+", required=True, help=f"the harness's names, or {' or '.join(TASK_SETS)}")
    parser.add_argument("--include_path", help="a folder of further tasks, as YAML files")
    parser.add_argument("--limit", type=float, help="only so many questions of each task, or such a share below 1")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_fewshot", type=int, help="examples in the prompt")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, args.adapter)
    try:
        results = evaluate_tasks(
            model,
            AutoTokenizer.from_pretrained(args.model),
            args.tasks,
            include_path=args.include_path,
            limit=args.limit,
            batch_size=args.batch_size,
            num_fewshot=args.num_fewshot,
        )
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    for task, metrics in results.items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                metric, comma, kind = name.partition(",")
                error = metrics.get(f"{metric}_stderr{comma}{kind}")
                print(f"{task:24} {name:12} {value:8.4f}" + ("" if error is None else f" ± {error:.4f}"))
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
