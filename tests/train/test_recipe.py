"""The calibration's numbers reach whoever sets none; training takes LoRA's, without special pieces."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import tiny_model, tokens
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup
from word_tokenizer import word_tokenizer

from peft_dlqat import DLQATCallback, DLQATConfig, calibrate, calibrate_from_disk
from peft_dlqat.train.calibrate import default_steps
from peft_dlqat.train.recipe import RECIPE


def test_calibration_defaults():
    callback = inspect.signature(DLQATCallback).parameters
    names = ("calibration_steps", "calibration_lr")
    assert [callback[name].default for name in names] == [None, RECIPE.calibration_lr]
    for function in (calibrate, calibrate_from_disk):
        parameters = inspect.signature(function).parameters
        assert [parameters[name].default for name in ("steps", "lr")] == [None, RECIPE.calibration_lr]
    assert [default_steps(by) for by in ("model", "blocks")] == [RECIPE.calibration_steps, RECIPE.block_steps]


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"calibration_lr": -1}, "calibration_lr=-1 must be a positive number"),
        ({"calibration_objective": "mse"}, "calibration_objective='mse' must be one of 'distill', 'task', 'output'"),
        ({"report_steps": -1}, "report_steps=-1 must be a non-negative integer"),
        ({"calibration_by": "layer"}, "calibration_by='layer' must be one of 'model', 'blocks'"),
    ],
    ids=str,
)
def test_the_callback_refuses_what_calibrate_would(argument, message):
    with pytest.raises(ValueError, match=message):
        DLQATCallback(**argument)


STEPS, LR = 20, 2e-4  # LoRA's usual rate
OPTIONS = {
    "max_steps": STEPS,
    "learning_rate": LR,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def by_trainer(model, folder):
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    run = Trainer(model, TrainingArguments(str(folder), **OPTIONS), train_dataset=data, callbacks=[DLQATCallback()])
    run.train()
    assert run.args.lr_scheduler_type == "linear" and run.args.max_grad_norm == 1
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def by_loop(model, folder):
    batch = {"input_ids": tokens(8), "labels": tokens(8)}
    calibrate(model, [batch], progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)  # with its own weight decay
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_sft_trainer(model, folder):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.SFTConfig(str(folder), bf16=False, gradient_checkpointing=False, **OPTIONS)
    run = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": tokens(8).tolist()}),
        processing_class=word_tokenizer(),
        callbacks=[DLQATCallback()],
    )
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("way", [by_trainer, by_loop, by_sft_trainer])
@pytest.mark.parametrize("zero_point", ["integer", pytest.param("float", marks=pytest.mark.slow)])
def test_loras_learning_rate_trains_by_every_way(way, zero_point, tmp_path):
    config = DLQATConfig(bits=3, group_size=32, init="minmax", zero_point=zero_point, task_type="CAUSAL_LM")
    losses = way(get_peft_model(tiny_model(), config), tmp_path)
    assert len(losses) == STEPS and losses[-1] < 0.92 * losses[0]
