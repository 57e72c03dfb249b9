"""Calibration and distillation refuse what cannot be, and leave the model, its modes and the generators alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import lm_batches, tiny_model, tokens
from peft import get_peft_model
from refusals import NAN, adapted, both_active, refused, small_config

from peft_dlqat import DistillationLoss, TeacherCache, calibrate


def calibration(model, batches=None, **kwargs):
    return calibrate(model, lm_batches() if batches is None else batches, **{"steps": 12, "progress": False, **kwargs})


def ids_with(key, value):
    return [{"input_ids": tokens(), key: torch.full_like(tokens(), value)}] * 2


STEPS = ("non-negative integer", "0 only")
RATE = ("must be", "positive", "the default is")
COUNTS = ("no position of the first 8 calibration batches counts", "labels are -100")
BATCH = ("must be a dict of the model's arguments", "'input_ids'")


@pytest.mark.parametrize(
    "kwargs, says",
    [
        *(({"steps": value}, (f"steps={value!r}", *STEPS)) for value in (-1, 2.0, True)),
        *(({"lr": value}, (f"lr={value!r}", *RATE)) for value in (0, -1e-2, NAN)),
        ({"objective": "mse"}, ("objective='mse'", "'distill', 'task'")),
        ({"by": "layer"}, ("by='layer'", "'model', 'blocks'")),
        ({"adapter_name": "other"}, ("'other'", "the model has ['default']")),
        ({"batches": []}, ("empty", "at least one batch")),
        ({"batches": iter(())}, ("empty", "at least one batch")),
        ({"batches": ids_with("labels", -100)}, COUNTS),
        ({"batches": ids_with("attention_mask", 0)}, COUNTS),
        ({"batches": [tokens()] * 2}, ("is a Tensor", *BATCH)),
        ({"batches": [(tokens(),)] * 2}, ("is a tuple", *BATCH)),
        (
            {"batches": [{"input_ids": tokens()}] * 2, "objective": "task"},
            ("no loss for objective='task'", "labels", "'distill'"),
        ),
    ],
)
def test_an_impossible_calibration_is_refused(kwargs, says):
    model = adapted()
    with refused(ValueError, *says, model=model):
        calibration(model, **kwargs)


@pytest.mark.parametrize("batches", [3, 10])  # before the first step, and when the scales have moved
def test_a_generator_that_ends_too_early_is_refused(batches):
    model = adapted()
    says = (f"ended after {batches} batches", "12 steps", f"pass a DataLoader or a list, or steps={batches}")
    with refused(ValueError, *says, model=model):
        calibration(model, iter(lm_batches(batches)), lr=0.1)


def test_a_model_that_cannot_be_calibrated_is_refused():
    model = tiny_model()
    with refused(ValueError, "no DL-QAT adapter", "get_peft_model", model=model):
        calibration(model)
    model = both_active()
    with refused(ValueError, "2 adapters are active", "'second'", "adapter_name", model=model):
        calibration(model)
    model = adapted()
    model.merge_adapter()
    with refused(ValueError, "merged", "unmerge_adapter", model=model):
        calibration(model)


# A step of distillation is two forward passes, the teacher's and the model's. Before the first, on as many batches as
# there are steps, up to 8, the loss is measured (two passes); min-max scales are not fitted to the inputs.
@pytest.mark.parametrize(
    "at, says",
    [
        (1, ("nan before calibration", "put back", "heck the data")),
        (2 * 6 + 2 * 3 + 1, ("nan at calibration step 4 of 6", "put back", "Lower lr=0.1")),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_loss_that_turns_nan_puts_everything_back(at, says, training):
    """Also what the model's own passes drew of random numbers, and a flag that PEFT has not set."""
    model = adapted().train(training)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    passes = []

    def poison(module, inputs, output):
        passes.append(1)
        torch.rand(1), np.random.rand(), random.random()
        output.logits = output.logits * (NAN if len(passes) >= at else 1.0)

    with refused(FloatingPointError, *says, model=model):
        hook = model.base_model.model.register_forward_hook(poison)
        try:
            calibration(model, steps=6, lr=0.1)
        finally:
            hook.remove()
    assert len(passes) >= at


@pytest.mark.parametrize(
    "settings, kwargs, says",
    [
        ({}, {"reverse": 2}, ("reverse=2", "from 0", "'confidence'")),
        ({}, {"task_weight": -1}, ("task_weight=-1", "0 or more")),
        ({"bias": "all"}, {}, ("train in place", "bias='none'", "cache.teacher(model, batch)")),
    ],
)
def test_an_impossible_distillation_is_refused(settings, kwargs, says):
    config = small_config(target_modules=["fc1"], task_type="CAUSAL_LM", **settings)
    student = get_peft_model(tiny_model("opt"), config)
    with refused(ValueError, *says, model=student):
        DistillationLoss(student, **kwargs)


@pytest.mark.parametrize(
    "kwargs, says",
    [
        ({"k": 0}, ("k=0", "positive integer", "64 is usual")),
        ({"max_bytes": 0}, ("max_bytes=0", "positive integer", "4 GiB")),
    ],
)
def test_an_impossible_cache_is_refused(kwargs, says):
    with refused(ValueError, *says):
        TeacherCache(**kwargs)
