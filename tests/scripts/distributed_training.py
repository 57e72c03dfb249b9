"""Calibrates and trains a small model, in one process or as one of several that torchrun started.

    torchrun --nproc_per_node 2 distributed_training.py FOLDER

Every process writes what it ended with to FOLDER: `trainer-RANK.pt`, and `calibrate-CASE-RANK.pt` by case.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from conftest import VOCAB, tiny_model, units_of
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_dlqat import DLQATCallback, DLQATConfig, calibrate
from peft_dlqat.layer import adapter_layers
from peft_dlqat.train.fit_to_inputs import input_moments

GLOBAL_BATCH = 8
CALIBRATION_STEPS = 8
CALIBRATION_LR = 0.01
TRAINING_STEPS = 20
LENGTH = 12
SAMPLES = 48  # six batches: calibration and training both come to the end of the data and go on

# `calibrate` alone, by case: bits, zero_point, scale_dtype, whether sequences differ in length.
# Only float32 scales can agree to a small tolerance: near a tie, bfloat16 turns a last bit into 2**-8.
CALIBRATIONS = {
    "integer": (2, "integer", "bfloat16", False),
    "none": (3, "none", "float32", False),
    "float": (3, "float", "float32", False),
    "lengths": (3, "float", "float32", True),
}


class Sequences(Dataset):
    """Distinct sequences of one length, so that a mean of means is the mean."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def make_model(seed: int, **config: Any) -> nn.Module:
    model = tiny_model("llama")
    torch.manual_seed(seed)  # of A
    return get_peft_model(model, DLQATConfig(group_size=16, r=4, task_type="CAUSAL_LM", **config))


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors, what trains times its unit."""
    state = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    units = units_of(model)
    for name, parameter in model.named_parameters():
        if parameter in units:
            state[name.replace(".default", "")] *= units[parameter]
    return state


def record_batches(model: nn.Module) -> list[torch.Tensor]:
    """A list to which the input_ids of every call of the model are added, as this process sees them."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].clone())

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def run_trainer(folder: Path) -> dict[str, Any]:
    """Calibration, then training by the Trainer, shuffled; every process takes its share of GLOBAL_BATCH.

    Training is by plain SGD, whose step is proportional to the gradient, with a modest learning rate: the last bits
    by which a sum over two processes differs from a sum over one then stay last bits. Adam's step is about its
    learning rate even where the gradient is nothing but such bits, and at a large learning rate the first code that
    falls to the other side of a rounding boundary makes the runs drift apart, as any two runs on other hardware do.
    For the same reason scales are kept in float32.
    """
    # The ranks begin with different A; the Trainer gives all of them the first one's.
    model = make_model(seed=rank(), bits=3, scale_dtype="float32")
    initial, batches = adapter(model), record_batches(model)
    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=GLOBAL_BATCH // world_size(),
        max_steps=TRAINING_STEPS,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,  # a gradient is as large as its unit
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        seed=11,
    )
    # The grid is reported in steps in which the Trainer logs, too: there every rank must still take part in the
    # gathering of the loss.
    callback = DLQATCallback(calibration_steps=CALIBRATION_STEPS, calibration_lr=CALIBRATION_LR, report_steps=10)
    trainer = Trainer(model, args, train_dataset=Sequences(), callbacks=[callback])
    trainer.train()
    log = trainer.state.log_history
    figures = [entry for entry in log if "calibration/loss_after" in entry]
    losses = {name: figures[0][f"calibration/{name}"] for name in ("loss_before", "loss_after")}
    return {"initial": initial, "adapter": adapter(model), "batches": batches, "losses": losses, "log": log}


def run_calibrate(case: str) -> dict[str, Any]:
    """`calibrate` alone: every process passes its own share of each batch."""
    bits, zero_point, scale_dtype, other_lengths = CALIBRATIONS[case]
    model = make_model(seed=0, bits=bits, zero_point=zero_point, scale_dtype=scale_dtype)
    initial, batches = adapter(model), record_batches(model)
    if zero_point == "integer":
        # Zero points move by a hundredth of a code in a step. Near the next integer, a few steps carry some over.
        for name, parameter in model.named_parameters():
            if ".dlqat_zero_point." in name:
                parameter += 0.485 * torch.where(parameter > 0, -1, 1)
    ids = Sequences().ids
    labels = ids.clone()
    if other_lengths:
        labels[torch.arange(LENGTH) >= 2 + ids[:, :1] % (LENGTH - 1)] = -100
    data = zip(ids.view(-1, GLOBAL_BATCH, LENGTH), labels.view(-1, GLOBAL_BATCH, LENGTH), strict=True)
    own = [
        {"input_ids": ids.chunk(world_size())[rank()], "labels": labels.chunk(world_size())[rank()]}
        for ids, labels in data
    ]
    moments = input_moments(model, adapter_layers(model)[1], own, progress=False)
    batches.clear()
    # The fit to the inputs takes the best of many scales. Where two are almost as good, the last bits of the moments
    # decide, and these differ between a sum over two processes and one: so the moments are compared, not what is
    # taken. The gradient steps are compared on the same start.
    with mock.patch("peft_dlqat.train.calibrate.fit_to_inputs"):
        result = calibrate(model, own, steps=CALIBRATION_STEPS, lr=CALIBRATION_LR, progress=False)
    losses = {"loss_before": result.loss_before, "loss_after": result.loss_after}
    state = {"initial": initial, "adapter": adapter(model), "batches": batches, "losses": losses}
    return {**state, "moments": moments}


def main(folder: Path) -> None:
    torch.save(run_trainer(folder), folder / f"trainer-{rank()}.pt")
    assert dist.get_backend() == "gloo"
    assert dist.get_world_size() == world_size() > 1
    for case in CALIBRATIONS:
        torch.save(run_calibrate(case), folder / f"calibrate-{case}-{rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
