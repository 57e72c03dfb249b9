"""The default recipe reaches whoever sets nothing, and what it would be is what PEFT's users have."""

from __future__ import annotations

import inspect

import pytest

from peft_dlqat import DLQATCallback, calibrate, calibrate_from_disk
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
