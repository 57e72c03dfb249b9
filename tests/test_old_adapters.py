"""Adapters that an earlier version saved (tests/adapters_256f47d/make.py) compute what they did, to the bit."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import peft_dlqat
from peft_dlqat.adapter_file import with_current_names
from peft_dlqat.layer import adapter_layers
from peft_dlqat.train.report import grid_report

FOLDER = Path(__file__).parent / "adapters_256f47d"
WEIGHTS = "adapter_model.safetensors"
_spec = importlib.util.spec_from_file_location("make_old_adapters", FOLDER / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
NAMES = sorted(make.CONFIGS)

pytestmark = pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['record'\]")  # tensors tell today


class TransformersBase(PreTrainedModel):
    """The base model as one of transformers'."""

    config_class = PreTrainedConfig

    def __init__(self, config=None):
        super().__init__(config or PreTrainedConfig())
        self.add_module("0", make.base_model()[0])

    def forward(self, x, labels=None):
        y = self.get_submodule("0")(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y} if labels is not None else y


def layer_of(model):
    (layer,) = adapter_layers(model)[1].values()
    return layer


def check(model, name):
    """It is the model that was saved, and its tensors are of this format."""
    expected, layer = load_file(FOLDER / name / "expected.safetensors"), layer_of(model)
    with torch.no_grad():
        assert torch.equal(model(torch.eye(make.IN)), expected["output"])
    weight = layer.quantized_weight()
    assert torch.equal(weight.codes, expected["codes"]) and torch.equal(weight.scale, expected["scale"])
    assert (weight.zero is None) == ("zero" not in expected)
    assert weight.zero is None or torch.equal(weight.zero, expected["zero"])
    old = load_file(FOLDER / name / WEIGHTS)
    for kind, (tensor, parameter) in layer.trained("default").items():
        value = next(value for key, value in old.items() if f"dlqat_{kind}" in key)
        assert torch.equal(tensor.value(parameter), value) and not torch.equal(parameter, value), kind


def older(name, folder, **changes):
    """A copy of the adapter by the names that the format had last; some of its magnitudes changed."""
    state = with_current_names(load_file(FOLDER / name / WEIGHTS))
    for key, values in changes.items():
        (found,) = (tensor for full, tensor in state.items() if key in full)
        found.view(-1)[: len(values)] = torch.tensor(values)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text((FOLDER / name / "adapter_config.json").read_text())


def from_pretrained(folder, **kwargs):
    return PeftModel.from_pretrained(make.base_model(), folder, **kwargs)


def by_load_adapter(folder):
    model = TransformersBase()
    model.load_adapter(folder)
    return model.eval()


def by_state_dict(folder):
    """Of a whole model, as torch's own checkpoints have it."""
    model = get_peft_model(make.base_model(), peft_dlqat.DLQATConfig.from_pretrained(folder))
    saved = {re.sub(r"(\.dlqat_\w+)", r"\1.default", key): value for key, value in load_file(folder / WEIGHTS).items()}
    state = model.state_dict()
    assert saved.keys() <= state.keys()
    model.load_state_dict(state | saved)
    return model


WAYS = {
    "from_pretrained": from_pretrained,
    "low_cpu_mem_usage": lambda folder: from_pretrained(folder, low_cpu_mem_usage=True),
    "transformers": by_load_adapter,
    "load_state_dict": by_state_dict,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_of_an_earlier_version(name, packed):
    model = from_pretrained(FOLDER / name)
    if packed:
        peft_dlqat.pack_weights(model)  # of what its config says, which may be nothing
    check(model, name)
    with torch.no_grad():
        output = model(torch.eye(make.IN))
        assert torch.equal(model.merge_and_unload()(torch.eye(make.IN)), output)


@pytest.mark.product(every=4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_converted_by_every_way_in_and_is_of_this_format_when_saved(name, way, tmp_path):
    older(name, tmp_path)
    model = WAYS[way](tmp_path)
    check(model, name)
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / WEIGHTS)
    assert {int(value[7]) for key, value in saved.items() if "dlqat_spec" in key} == {3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = WAYS[way](tmp_path / "again")
    check(again, name)


def test_who_looks_at_it_before_the_first_forward_sees_it_converted(tmp_path):
    older("dlqat-integer", tmp_path)
    seen, expected = (grid_report(WAYS[way](tmp_path)).layers[0] for way in ("transformers", "from_pretrained"))
    assert (seen.magnitude_min, seen.magnitude_max) == (expected.magnitude_min, expected.magnitude_max)
    assert 0 < seen.magnitude_max < 3


def in_unit_32(name, folder):
    """The adapter in this format, in a unit that is not the layer's."""
    from_pretrained(FOLDER / name).save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    trained = ("dlqat_A", "dlqat_B", "dlqat_magnitude", "dlqat_shift")
    for key, tensor in state.items():
        if any(kind in key for kind in trained):
            tensor *= 2
        elif "dlqat_spec" in key:
            assert tensor[7] == 3 + 64 / 1024
            tensor[7] = 3 + 32 / 1024
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


FIRST = {
    "forward": lambda model: None,
    "compiled": lambda model: torch.compile(model, backend="eager")(torch.eye(make.IN)),
    "codes": lambda model: layer_of(model).quantized_weight(),
    "packed": peft_dlqat.pack_weights,
    "report": grid_report,
}


@pytest.mark.product(every=3)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("way", WAYS)
def test_another_unit_is_converted_whatever_is_done_first(way, first, tmp_path):
    name = "dlqat-int4" if first == "packed" else "dlqat-float"
    in_unit_32(name, tmp_path)
    model = WAYS[way](tmp_path)
    FIRST[first](model)
    check(model, name)
    assert layer_of(model).dlqat_spec["default"][7] == 3 + 64 / 1024


def test_a_state_dict_without_the_unit_is_refused(tmp_path):
    model = from_pretrained(FOLDER / "dlqat-integer")
    state = {key: value for key, value in model.state_dict().items() if "dlqat_spec" not in key}
    with pytest.raises(ValueError, match=r"not the dlqat_spec .* in which unit"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("way", WAYS)
def test_magnitudes_that_do_not_convert_exactly_are_counted_and_said_once(way, tmp_path):
    older("dlqat-integer", tmp_path, dlqat_magnitude=[0.3, -0.3, 0.1, -2.0, 0.0, 0.75])
    values = load_file(tmp_path / WEIGHTS)["base_model.model.0.dlqat_magnitude.weight"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = WAYS[way](tmp_path)
        for _ in range(2):
            model(torch.eye(make.IN))
    tensor, parameter = layer_of(model).trained("default")["magnitude"]
    off = (tensor.value(parameter.detach()) - values).abs()
    assert 0 < off.count_nonzero() <= 3 and off.max() < 1e-6
    (said,) = [str(warning.message) for warning in caught if "of an older version" in str(warning.message)]
    count = "some" if way == "load_state_dict" else int(off.count_nonzero())
    assert said.startswith(f"{count} magnitudes of the saved adapter") and "below 0.5 and are rounded" in said


def test_names_that_transformers_does_not_find_are_refused():
    """Its own loading knows nothing of the names that the format had first, and goes on without the tensors."""
    model = by_load_adapter(FOLDER / "dlqat-integer")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"missing.*dlqat_"):
            model(torch.eye(make.IN))


def trainer(model, folder, **kwargs):
    inputs = torch.eye(make.IN)
    data = [{"x": x, "labels": torch.zeros(make.OUT)} for x in inputs]
    own = {"max_steps": 4, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    callbacks = [peft_dlqat.DLQATCallback(calibration=False)]
    arguments = TrainingArguments(str(folder), **{**own, **kwargs})
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def old_checkpoint(name, folder, **kwargs):
    """A checkpoint of a run, with an adapter of the earlier version in it; and a new model like the run's."""
    config = peft_dlqat.DLQATConfig.from_pretrained(FOLDER / name)
    config.inference_mode = False
    trainer(get_peft_model(TransformersBase(), config), folder, **kwargs).train()
    older(name, folder / "checkpoint-2")
    return get_peft_model(TransformersBase(), config)


def test_a_trainers_checkpoint_is_converted_and_goes_on(tmp_path):
    model = old_checkpoint("dlqat-integer", tmp_path, save_only_model=True)
    run = trainer(model, tmp_path, max_steps=3, learning_rate=0.0)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check(model.eval(), "dlqat-integer")


def test_the_state_of_an_older_optimizer_is_in_other_units(tmp_path):
    model = old_checkpoint("dlqat-integer", tmp_path)
    run = trainer(model, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint is of an older version.*is_trainable=True"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # of this version
