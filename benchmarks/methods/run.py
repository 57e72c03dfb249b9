"""Trains one experiment after another and writes each one's figures beside it.

An experiment is a small JSON file: a model, its data, a `DLQATConfig`, and how long to calibrate and train. The
objective is always the KL divergence to the full-precision model, so that what is measured is what quantization costs.

    python benchmarks/methods/run.py benchmarks/methods/experiments/*.json --model PATH_OR_HUB_ID --tokens FILE

`--tokens` is a safetensors file with integer tensors `train` [n, length] and `heldout` [n, length].
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, get_scheduler

from peft_dlqat import (
    DLQATConfig,
    calibrate,
    create_dlqat_optimizer,
    distillation_loss,
    grid_report,
    teacher_logits,
)

RESULTS = Path(__file__).parents[1] / "results" / "methods"


def batches(ids: torch.Tensor, steps: int, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """`steps` batches of `size` rows, reshuffled each epoch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // len(ids))
    order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(epochs)])
    return [{"input_ids": ids[rows]} for rows in order[: steps * size].split(size)]


@torch.no_grad()
def evaluate(model: torch.nn.Module, heldout: torch.Tensor) -> dict[str, float]:
    """Held-out KL to the full-precision model and next-token loss in nats a token, and agreement of the top token."""
    training = model.training
    model.eval()
    totals = torch.zeros(3)
    for ids in heldout.split(16):
        batch = {"input_ids": ids}
        teacher, student = teacher_logits(model, batch), model(**batch).logits
        loss = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        agreement = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
        totals += len(ids) * torch.stack([distillation_loss(student, teacher), loss, agreement])
    model.train(training)
    return dict(zip(("kl", "loss", "agreement"), (totals / len(heldout)).tolist(), strict=True))


def run(experiment: dict[str, Any], model_id: str, tokens: dict[str, torch.Tensor], seed: int) -> dict[str, Any]:
    """Calibrate and train one adapter; returns its figures at each stage."""
    train, heldout = tokens["train"].long(), tokens["heldout"].long()
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32)
    model = get_peft_model(base, DLQATConfig(task_type="CAUSAL_LM", **experiment["config"]))
    figures: dict[str, Any] = {"seed": seed, "initial": evaluate(model, heldout)}
    started = time.perf_counter()

    size = experiment["batch_size"]
    if steps := experiment["calibration_steps"]:
        calibrate(model, batches(train, steps, size, seed), steps=steps, **experiment.get("calibration", {}))
        figures["calibrated"] = evaluate(model, heldout)

    model.train()
    steps, warmup = experiment["train_steps"], experiment.get("warmup_steps", 20)
    optimizer = create_dlqat_optimizer(model, torch.optim.AdamW, **experiment["optimizer"])
    schedule = get_scheduler(experiment.get("schedule", "linear"), optimizer, warmup, steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*never calibrated.*")
        for batch in tqdm(batches(train, steps, size, seed + 1000), desc=experiment["name"]):
            loss = distillation_loss(model(**batch).logits, teacher_logits(model, batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    figures["trained"] = evaluate(model, heldout)
    figures["seconds"] = round(time.perf_counter() - started)
    figures["grid"] = grid_report(model).summary()
    return figures


def main() -> None:
    """Run the experiments named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, help="JSON files")
    parser.add_argument("--model", required=True, help="folder or hub id of the full-precision model")
    parser.add_argument("--tokens", required=True, type=Path, help="safetensors file with `train` and `heldout` ids")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    tokens = load_file(args.tokens)
    args.results.mkdir(parents=True, exist_ok=True)
    for path in args.experiments:
        experiment = {"name": path.stem, **json.loads(path.read_text())}
        runs = [run(experiment, args.model, tokens, seed) for seed in args.seeds]
        result = {
            "experiment": experiment,
            "model": Path(args.model).name,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
                "python": platform.python_version(),
            },
            "runs": runs,
        }
        target = args.results / f"{path.stem}.json"
        target.write_text(json.dumps(result, indent=2) + "\n")
        for figures in runs:
            stages = [stage for stage in ("initial", "calibrated", "trained") if stage in figures]
            shown = ", ".join(f"{stage} {figures[stage]['kl']:.4f}" for stage in stages)
            print(f"{path.stem} seed {figures['seed']}: held-out KL {shown} ({figures['seconds']} s) -> {target}")


if __name__ == "__main__":
    main()
