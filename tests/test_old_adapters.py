"""Adapters that an earlier version saved (tests/adapters_256f47d/make.py) compute what they did, to the bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import peft_dlqat
from peft_dlqat.layer import adapter_layers

FOLDER = Path(__file__).parent / "adapters_256f47d"
_spec = importlib.util.spec_from_file_location("make_old_adapters", FOLDER / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.mark.parametrize("name", sorted(make.CONFIGS))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['record'\]")  # tensors tell today
def test_an_adapter_of_an_earlier_version(name, packed):
    expected = load_file(FOLDER / name / "expected.safetensors")
    model = PeftModel.from_pretrained(make.base_model(), FOLDER / name)
    if packed:
        peft_dlqat.pack_weights(model)  # of what its config says, which may be nothing
    (layer,) = adapter_layers(model)[1].values()
    weight = layer.quantized_weight()
    assert torch.equal(weight.codes, expected["codes"]) and torch.equal(weight.scale, expected["scale"])
    assert (weight.zero is None) == ("zero" not in expected)
    assert weight.zero is None or torch.equal(weight.zero, expected["zero"])
    with torch.no_grad():
        assert torch.equal(model(torch.eye(make.IN)), expected["output"])
        assert torch.equal(model.merge_and_unload()(torch.eye(make.IN)), expected["output"])
