"""How good LoRA's usual learning rate is: the plain Trainer, its AdamW and its linear schedule, at several rates.

    python benchmarks/learning_rates.py [--model PATH_OR_HUB_ID] [--tokens FILE] [--bits 3 2] [--objectives sft distil]

Everything else is the default, of `DLQATConfig`, `DLQATCallback` and `TrainingArguments`: gradients are clipped to 1.
Each run is kept as it ends, and not repeated. `--report` prints the table, and where 2e-4 is more than 10 % above the
best: of the held-out loss where the next token is learned, of the KL where the teacher is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from runs import keep
from tokens import EMBEDDED, make_tokens
from torch import nn
from training import Task, plain_arguments
from transformers import Trainer

from peft_dlqat import DLQATCallback, DLQATConfig, distillation_loss

RESULTS = Path(__file__).resolve().parent / "results" / "learning_rates.json"
RATES = [3e-5, 1e-4, 2e-4, 4e-4, 1e-3]
USUAL, MARGIN = 2e-4, 1.1
JUDGED_BY = {"sft": "loss", "distil": "kl"}
"""The held-out figure that tells which rate is best, by what is trained on."""


class _Rows(Trainer):
    """Trains on rows of a task: on their next tokens, or on what the full-precision model says of them."""

    def __init__(self, task: Task, objective: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task, self.objective = task, objective

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        logits = model(input_ids=ids).logits
        if self.objective == "sft":
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return distillation_loss(logits, self.task.teacher("train", inputs["row"].cpu()))


def measure(task: Task, objective: str, config: dict[str, Any], batch: int, steps: int, lr: float) -> dict[str, float]:
    """Held-out figures after a run."""
    data = [{"input_ids": ids, "row": row} for row, ids in enumerate(task.ids["train"])]
    with tempfile.TemporaryDirectory() as folder:
        arguments = plain_arguments(folder, lr, steps, batch, seed=0)
        torch.manual_seed(0)
        model = get_peft_model(task.load_model(), DLQATConfig(**config, task_type="CAUSAL_LM"))
        _Rows(task, objective, model=model, args=arguments, train_dataset=data, callbacks=[DLQATCallback()]).train()
    return {name: round(value, 5) for name, value in task.evaluate(model).items()}


def report(runs: list[dict[str, Any]]) -> str:
    """A row for each work, the figure of each rate beside it, and how far the usual rate is from the best."""
    rates = sorted({run["lr"] for run in runs})
    head = [
        "",
        "bits",
        "zero_point",
        "trained on",
        "tokens a step",
        "steps",
        *(f"{lr:g}" for lr in rates),
        "2e-4 above the best",
    ]
    works: dict[tuple[Any, ...], dict[float, float]] = {}
    for run in runs:
        zeros = run["config"].get("zero_point", "none")
        work = (run["model"], run["bits"], zeros, *(run[key] for key in ("objective", "tokens", "steps")))
        works.setdefault(work, {})[run["lr"]] = run[JUDGED_BY[run["objective"]]]
    rows = []
    for work, figures in sorted(works.items()):
        cells = [f"{figures[lr]:.4f}" if lr in figures else "" for lr in rates]
        away = f"{figures[USUAL] / min(figures.values()) - 1:.1%}" if USUAL in figures and len(figures) > 1 else ""
        rows.append([*map(str, work), *cells, away])
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0].replace("|  |", "| |"), "|---" * len(head) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; the embedded model if none is given")
    parser.add_argument("--tokens", type=Path, help="safetensors file as for run.py; text of the model's own if none")
    parser.add_argument("--name", help="the model's in the table; its folder's if none is given")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--objectives", nargs="+", default=["sft", "distil"], choices=sorted(JUDGED_BY))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--set", default="{}", help="further arguments of DLQATConfig, as JSON")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and run nothing")
    args = parser.parse_args()
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if args.report:
        print(report(runs))
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    model = args.model or str(EMBEDDED / "model")
    name = args.name or ("embedded" if args.model is None else Path(model).name)
    task = Task(model, args.tokens or make_tokens(model, name, 480, 48))
    length = task.ids["train"].shape[1]
    for batch, bits, objective, lr in product(args.batch_sizes, args.bits, args.objectives, args.rates):
        config = {"bits": bits, **json.loads(args.set)}
        what = {
            "model": name,
            "bits": bits,
            "config": config,
            "objective": objective,
            "tokens": batch * length,
            "steps": args.steps,
            "lr": lr,
        }
        keep(RESULTS, runs, what, partial(measure, task, objective, config, batch, args.steps, lr))
    print(report(runs))


if __name__ == "__main__":
    main()
