"""A small training run with checkpoints, and a command that stops in the middle of it to be killed.

    python resumable_training.py FOLDER WHERE

WHERE is "calibrating", or the number of the training step inside which to stop. When it gets there, it writes the file
FOLDER/reached and waits.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import VOCAB, tiny_model
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dlqat import DLQATCallback, DLQATConfig

CALIBRATION_STEPS = 6
TRAINING_STEPS = 10
SAVE_STEPS = 4
REACHED = "reached"


class Sequences(Dataset):
    """24 sequences: with batches of 2 and accumulation over 2, an epoch of 6 steps."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, VOCAB, (24, 12), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


def make_trainer(
    folder: Path, callbacks: list[TrainerCallback] | None = None, max_steps: int = TRAINING_STEPS, **config: Any
) -> Trainer:
    """A Trainer that shuffles, accumulates gradients over 2 batches, has dropout, and saves every 4 steps."""
    model = tiny_model("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1  # draws random numbers, so a resumed run must go on with the same ones
    torch.manual_seed(0)
    settings = {"bits": 3, "group_size": 16, "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(model, DLQATConfig(**settings))
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=max_steps,
        save_steps=SAVE_STEPS,
        logging_steps=2,
        learning_rate=1e-4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=3,
    )
    calibrating = DLQATCallback(calibration_steps=CALIBRATION_STEPS, calibration_lr=0.01, report_steps=3)
    return Trainer(model, args, train_dataset=Sequences(), callbacks=[calibrating, *(callbacks or [])])


class StopInStep(TrainerCallback):
    """Waits to be killed between the two batches of a step."""

    def __init__(self, step: int, reached: Path) -> None:
        self.step, self.reached = step, reached

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            wait_to_be_killed(self.reached)


def wait_to_be_killed(reached: Path) -> None:
    reached.touch()
    time.sleep(300)
    sys.exit("nobody killed this process")


def main(folder: Path, where: str) -> None:
    reached = folder / REACHED
    if where == "calibrating":  # in its first step, when scales and zeros have moved
        with mock.patch("peft_dlqat.train.descent.keep_in_range", lambda *_: wait_to_be_killed(reached)):
            make_trainer(folder / "run").train()
    make_trainer(folder / "run", [StopInStep(int(where), reached)]).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
