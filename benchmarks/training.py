"""One run: the same data, steps, schedule and loss for every contender, and the same figures at the end."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import contenders
import torch
from peers.common import Batches, Prepared, grid_for, with_divisors
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments, get_scheduler
from transformers.pytorch_utils import Conv1D

from peft_dlqat import DLQATConfig, distillation_loss, evaluate_tasks
from peft_dlqat.evaluate import resolve_tasks
from peft_dlqat.train.recipe import RECIPE

_REPOSITORY = Path(__file__).resolve().parents[1]
# Batches on which scales are fitted and post-training contenders calibrate.
_CALIBRATION_BATCHES = 8
# The teacher's logits are kept for every sequence where that takes no more than this many bytes.
_MOST_CACHED = 2**31


class Task:
    """A full-precision model, its tokens, and what it says about them.

    Args:
        model_id: folder or hub id.
        tokens: safetensors file with integer tensors `train` [n, length] and `heldout` [m, length], and for a
            calibration on another domain `other` [k, length].
    """

    def __init__(self, model_id: str, tokens: Path) -> None:
        self.model_id = model_id
        found = load_file(tokens)
        self.ids = {split: found[split].long() for split in ("train", "heldout", "other") if split in found}
        self._teacher = self.load_model().eval()
        vocabulary = self._teacher.get_output_embeddings().weight.shape[0]
        self._cached: dict[str, torch.Tensor] = {}
        for split, rows in self.ids.items():
            if split != "other" and rows.numel() * vocabulary * 4 <= _MOST_CACHED:
                self._cached[split] = torch.cat([self._logits(part) for part in rows.split(16)])

    def load_model(self) -> PreTrainedModel:
        """The model in float32, on a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(self.model_id, dtype=torch.float32)
        model.config.use_cache = False
        return model.to(device)

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self._teacher(input_ids=ids.to(self._teacher.device)).logits

    def teacher(self, split: str, rows: torch.Tensor) -> torch.Tensor:
        """The full-precision model's logits on some rows of a split."""
        return self._cached[split][rows] if split in self._cached else self._logits(self.ids[split][rows])

    def batches(self, steps: int, size: int, seed: int, split: str = "train") -> list[torch.Tensor]:
        """Rows of a split for `steps` batches of `size`, shuffled anew each epoch."""
        generator, count = torch.Generator().manual_seed(seed), len(self.ids[split])
        epochs = max(1, -(-steps * size // count))
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        return list(order[: steps * size].split(size)) if steps else []

    def calibration(self, size: int, seed: int, steps: int, data: str) -> Batches:
        """Batches to calibrate on, as many as are asked for and at least what a fit to the inputs takes.

        `data` is a split, "train" or, of another domain, "other"; or "random" for tokens drawn uniformly.
        """
        count = max(steps, _CALIBRATION_BATCHES)
        if data == "random":
            vocabulary = self._teacher.get_input_embeddings().weight.shape[0]
            generator = torch.Generator().manual_seed(seed)
            shape = (count, size, self.ids["train"].shape[1])
            batches = list(torch.randint(vocabulary, shape, generator=generator))
        else:
            if data not in self.ids:
                raise ValueError(
                    f"calibration_data={data!r}: the tokens have only {sorted(self.ids)}, beside 'random'."
                )
            batches = [self.ids[data][rows] for rows in self.batches(count, size, seed, data)]
        return [{"input_ids": ids.to(self._teacher.device)} for ids in batches]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On held-out rows, in nats a token: KL to the full-precision model, and loss.

        Not the package's `evaluate_model`: the teacher's logits are at hand here, and every position counts, the last
        of a row too, which has no next token but a distribution like the others.
        """
        model.eval()
        totals = torch.zeros(2)
        for rows in torch.arange(len(self.ids["heldout"])).split(32):
            ids = self.ids["heldout"][rows].to(self._teacher.device)
            teacher, student = self.teacher("heldout", rows), model(input_ids=ids).logits
            loss = nn.functional.cross_entropy(student[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            totals += len(rows) * torch.stack([distillation_loss(student, teacher), loss]).cpu()
        return dict(zip(("kl", "loss"), (totals / len(self.ids["heldout"])).tolist(), strict=True))


@cache
def load_task(model_id: str, tokens: Path) -> Task:
    """The task, once a process."""
    return Task(model_id, tokens)


def run(
    task: Task,
    contender: str,
    setting: dict[str, Any],
    training: dict[str, Any],
    seed: int,
    lr: float | None = None,
    tasks: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Quantize, or train and quantize, a fresh model.

    Args:
        task: model and data.
        contender: a name in `contenders`.
        setting: arguments of `DLQATConfig`.
        training: batch_size, steps, schedule (transformers' name), warmup_steps; `calibration_steps` are taken out of
            the steps; `calibration_data` is "train", "other" or "random"; gradients are clipped to `max_grad_norm`.
        seed: of the weights and of the order of the data.
        lr: learning rate, for contenders that train.
        tasks: "names" of tasks of the lm-evaluation-harness, and "include_path", a folder of those that are not its
            own, as seen from the repository.

    Returns:
        `bits_per_weight`, `seconds` of processor time (those of runs beside others can't be compared), the figures of
        `Task.evaluate`, with `tasks` the accuracies by name, and of LoRA left beside its weights `unmerged`.
    """
    torch.manual_seed(seed)
    size, calibration_steps = training.get("batch_size", 16), steps_of_calibration(training)
    data = training.get("calibration_data", "train")
    model, calibration = task.load_model(), task.calibration(size, seed, calibration_steps, data)
    if contender == contenders.FULL_PRECISION:
        width = 8.0 * next(model.parameters()).element_size()
    else:
        width = bits_per_weight(model, contenders.own_grid(contender, setting))
    prepared, started = None, time.process_time()
    if contenders.is_trained(contender):
        assert lr is not None
        prepared = contenders.prepare(contender, model, setting, calibration, calibration_steps)
        for _ in steps(task, contender, prepared, training, seed, lr):
            pass
        model = prepared.finish()
    else:
        model = contenders.quantize(contender, model, setting, calibration, training.get("steps"))
    seconds = round(time.process_time() - started, 1)
    figures = {"bits_per_weight": width, "seconds": seconds, **task.evaluate(model), **accuracies(task, model, tasks)}
    if prepared is not None and prepared.unmerged is not None:
        figures["unmerged"] = {"kl": task.evaluate(prepared.unmerged())["kl"]}
    return figures


def accuracies(task: Task, model: PreTrainedModel, tasks: dict[str, Any] | None) -> dict[str, dict[str, float]]:
    """{"tasks": accuracy by name}; nothing if there are no tasks."""
    if not tasks:
        return {}
    tokenizer = AutoTokenizer.from_pretrained(task.model_id)
    folder = _REPOSITORY / tasks["include_path"] if "include_path" in tasks else None
    found = evaluate_tasks(model, tokenizer, tasks["names"], include_path=folder, batch_size=16)
    # Not those that a group is made of, nor what has no accuracy, as a perplexity.
    names = [name for name in resolve_tasks(tasks["names"]) if "acc" in found.get(name, {})]
    return {"tasks": {name: found[name]["acc"] for name in names}}


def plain_arguments(folder: str, lr: float, steps: int, batch_size: int, seed: int) -> TrainingArguments:
    """The Trainer's own AdamW, linear schedule and clipping; nothing is logged or saved, and all columns are kept."""
    return TrainingArguments(
        folder,
        learning_rate=lr,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
    )


def bits_per_weight(model: PreTrainedModel, setting: dict[str, Any]) -> float:
    """Mean over the weights of all linear layers but the head, with their share of scales and zeros."""
    config, bits, weights = DLQATConfig(**with_divisors(model, setting)), 0.0, 0
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head:
            in_features = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
            bits += grid_for(config, name, in_features).bits_per_weight() * layer.weight.numel()
            weights += layer.weight.numel()
    return round(bits / weights, 3)


def steps_of_calibration(training: dict[str, Any]) -> int:
    """The recipe's, unless they are given."""
    return training.get("calibration_steps", RECIPE.calibration_steps)


def steps(
    task: Task, contender: str, prepared: Prepared, training: dict[str, Any], seed: int, lr: float
) -> Iterator[None]:
    """The training loop, a step at a time."""
    count = training["steps"] - steps_of_calibration(training)
    groups = [{"params": group["params"], "lr": lr * group["lr_factor"]} for group in prepared.parameters]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_scheduler(
        training["schedule"],
        optimizer,
        training["warmup_steps"],
        count,
        scheduler_specific_kwargs=training.get("schedule_arguments", {}),
    )
    model = prepared.model.train()
    for rows in task.batches(count, training["batch_size"], seed + 1000):
        ids = task.ids["train"][rows].to(model.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*never calibrated.*")
            logits = model(input_ids=ids).logits
        if contender in contenders.NEXT_TOKEN:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        else:
            loss = distillation_loss(logits, task.teacher("train", rows))
        optimizer.zero_grad()
        loss.backward()
        if most := training.get("max_grad_norm"):
            nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], most)
        optimizer.step()
        schedule.step()
        yield
