"""The default recipe reaches whoever sets nothing."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import lm_batches, tiny_model
from peft import get_peft_model
from transformers import Trainer

from peft_dlqat import RECIPE, DLQATCallback, DLQATConfig, calibrate, calibrate_from_disk, create_dlqat_optimizer
from peft_dlqat.train.calibrate import default_steps
from peft_dlqat.train.recipe import Recipe


def adapted():
    return get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, init="minmax", task_type="CAUSAL_LM"))


def test_calibration_defaults():
    callback = inspect.signature(DLQATCallback).parameters
    names = ("calibration_steps", "calibration_lr")
    assert [callback[name].default for name in names] == [None, RECIPE.calibration_lr]
    for function in (calibrate, calibrate_from_disk):
        parameters = inspect.signature(function).parameters
        assert [parameters[name].default for name in ("steps", "lr")] == [None, RECIPE.calibration_lr]
    assert [default_steps(by) for by in ("model", "blocks")] == [RECIPE.calibration_steps, RECIPE.block_steps]


@pytest.mark.parametrize("width, share", [(64, 1.0), (256, 1.0), (4096, 1 / 16)])
def test_the_learning_rate_falls_with_the_width(width, share):
    model = tiny_model()
    model.config.hidden_size = width
    assert RECIPE.lr(model) == RECIPE.learning_rate * share
    assert RECIPE.lr(torch.nn.Linear(2, 2)) == RECIPE.learning_rate


@pytest.mark.parametrize("tokens, share", [(1024, 0.5), (4096, 1.0), (2**20, 1.0)])
def test_the_learning_rate_falls_with_fewer_tokens_a_step(tmp_path, tokens, share):
    """As the square root; it does not rise beyond those that it was found with."""
    assert RECIPE.lr(adapted(), tokens) == RECIPE.learning_rate * share
    arguments = RECIPE.training_arguments(adapted(), str(tmp_path), tokens_per_step=tokens, report_to="none")
    assert arguments.learning_rate == RECIPE.learning_rate * share


@pytest.mark.parametrize("tokens", [0, -1, float("nan"), True])
def test_a_step_has_tokens(tokens):
    with pytest.raises(ValueError, match=f"tokens_per_step={tokens}: must be positive"):
        RECIPE.lr(adapted(), tokens)


def test_the_optimizer_has_the_recipes_rates():
    optimizer = create_dlqat_optimizer(adapted(), torch.optim.AdamW)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {RECIPE.learning_rate, 6 * RECIPE.learning_rate}
    optimizer = create_dlqat_optimizer(adapted(), torch.optim.AdamW, lr=1e-3)
    assert optimizer.defaults["lr"] == 1e-3
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 6 * 1e-3}
    l4q = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, init="minmax", method="l4q"))
    optimizer = create_dlqat_optimizer(l4q, torch.optim.AdamW, lr=1e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 0.5e-3}
    optimizer = create_dlqat_optimizer(l4q, torch.optim.AdamW, lr=1e-3, magnitude_lr=2e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 2e-3}


def test_what_trains_beside_the_adapter_decays_as_the_trainer_has_it():
    config = DLQATConfig(bits=3, group_size=32, init="minmax", modules_to_save=["model.norm", "lm_head"])
    model = get_peft_model(tiny_model(), config)
    optimizer = create_dlqat_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter].rpartition("model.")[2]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if "modules_to_save" in names[parameter]
    }
    assert found == {
        "lm_head.modules_to_save.default.weight": (1e-3, 0.1),
        "norm.modules_to_save.default.weight": (1e-3, 0.0),
    }


@pytest.mark.parametrize("rates", [{"lr": -1.0}, {"lr": float("nan")}, {"magnitude_lr": float("inf")}], ids=str)
def test_rates_that_no_training_could_have(rates):
    (name,) = rates
    with pytest.raises(ValueError, match=f"{name}=.* must be a number, 0 or more; the recipe has 0.014"):
        create_dlqat_optimizer(adapted(), torch.optim.AdamW, **rates)


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


def test_a_trainer_follows_the_schedule(tmp_path):
    """The rate rises over the warmup and falls to zero as the square of the steps left."""
    model, steps = adapted(), 40
    arguments = RECIPE.training_arguments(model, str(tmp_path), max_steps=steps, report_to="none", save_strategy="no")
    optimizer = create_dlqat_optimizer(model, torch.optim.AdamW)
    data = [
        dict(zip(batch, rows, strict=True)) for batch in lm_batches() for rows in zip(*batch.values(), strict=True)
    ]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[DLQATCallback()], optimizers=(optimizer, None))
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for _ in range(steps):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        optimizer.step()
        trainer.lr_scheduler.step()
    warmup = round(RECIPE.warmup * steps)
    expected = [RECIPE.learning_rate * ((steps - step) / (steps - warmup)) ** 2 for step in range(warmup, steps)]
    assert rates[warmup:] == pytest.approx(expected)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "calibration/loss_after" in entry]
    assert [entry.get("calibration_step", 0) for entry in logged] == [RECIPE.calibration_steps]


def test_another_schedule_trains(tmp_path):
    model = adapted()
    arguments = RECIPE.training_arguments(
        model, str(tmp_path), lr_scheduler_type="cosine", max_steps=2, report_to="none", save_strategy="no"
    )
    data = [{name: rows[0] for name, rows in batch.items()} for batch in lm_batches()]
    Trainer(model, arguments, train_dataset=data, callbacks=[DLQATCallback()]).train()


def test_arguments_take_precedence(tmp_path):
    arguments = Recipe(learning_rate=1e-2).training_arguments(
        adapted(), str(tmp_path), warmup_steps=5, report_to="none", lr_scheduler_type="linear"
    )
    assert (arguments.learning_rate, arguments.warmup_steps) == (1e-2, 5)
    assert arguments.lr_scheduler_type == "linear"
