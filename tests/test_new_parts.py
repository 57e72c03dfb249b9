"""A method, a storage and a layer setting, each added from one place: everything else sees it.

For a format see tests/formats/test_new_format.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import lm_batches, perturb, tiny_model, tokens, train
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_dlqat import DLQATConfig, calibrate, export_model, pack_weights
from peft_dlqat.layer import adapter_layers
from peft_dlqat.layer_spec import layer_setting
from peft_dlqat.methods import DLQAT, METHODS, TrainedTensor
from peft_dlqat.quant.fixed_point import STORAGES, Storage

pytestmark = pytest.mark.filterwarnings("ignore:.*never calibrated")


class Gain(DLQAT):
    """DL-QAT without m, and a gain for each output."""

    name, number, title, arxiv = "gain", 77, "Gain", "0000.00000"
    magnitudes = ("none",)

    def trained(self, grid, out_features, n_groups, r):
        gain = TrainedTensor((out_features, 1), start=1.0, unit=0.25, block_step=0.25)
        return {**super().trained(grid, out_features, n_groups, r), "gain": gain}

    def quantizer(self, tensors):
        quantizer = super().quantizer(tensors)
        return replace(quantizer, scale=tensors.trained["gain"] * quantizer.scale)


class Int16(Storage):
    """A storage of its own packing."""

    def encode(self, units, codes, grid):
        parts = 2 ** (12 - grid.bits)
        inside = ((units - codes + 0.5) * parts).floor().clamp(0, parts - 1)
        return (codes * parts + inside).to(torch.int16)

    def decode(self, packed, grid):
        parts = 2 ** (12 - grid.bits)
        return packed.float() / parts + 0.5 / parts - 0.5


def check_half(name, value):
    if not 0 <= value <= 0.5:
        raise ValueError(f"{name}={value!r} must be from 0 to 0.5; use 0.")


@dataclass
class DampedConfig(DLQATConfig):
    """A config with one more setting of its layers."""

    damping: float = layer_setting(0.0, "How much of m - 1 is left out.", check_half)
    damping_pattern: dict[str, float] = field(default_factory=dict)


class Damped(DLQAT):
    """DL-QAT, its scales pulled towards the calibrated ones."""

    name, number = "damped", 78

    def quantizer(self, tensors):
        quantizer = super().quantizer(tensors)
        damping = tensors.others["damping"]
        return replace(quantizer, scale=damping * tensors.s + (1 - damping) * quantizer.scale)


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens(2, 8)).logits


def reloaded(model, folder):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_model(), folder)


def gains(model):
    return torch.cat([layer.dlqat_gain["default"].detach() for layer in adapter_layers(model)[1].values()])


@pytest.fixture
def gain_model(monkeypatch):
    monkeypatch.setitem(METHODS, "gain", Gain)
    config = DLQATConfig(bits=3, group_size=32, zero_point="none", method="gain", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), config)


def test_a_methods_new_tensor_counts_from_its_start_in_its_unit(gain_model):
    layer = next(iter(adapter_layers(gain_model)[1].values()))
    before = layer.quantized_weight()
    layer.dlqat_gain["default"].data.fill_(1 / 32)  # of 16: half of the start more
    after = layer.quantized_weight()
    assert torch.equal(after.codes, before.codes)
    assert torch.allclose(after.scale, 1.5 * before.scale, rtol=2.0**-8)  # rounded to bfloat16


def test_a_methods_new_tensor_is_fitted_by_blocks(gain_model):
    calibrate(gain_model, lm_batches(), steps=3, by="blocks", train_adapter=True, progress=False)
    assert (gains(gain_model) != 0).any()


def test_a_methods_new_tensor_is_saved_loaded_merged_and_exported(gain_model, tmp_path):
    layer = next(iter(adapter_layers(gain_model)[1].values()))
    assert not layer.moved("default")
    layer.dlqat_gain["default"].data[0] = 0.5
    assert layer.moved("default")  # which export asks for
    train(gain_model)
    expected = logits(gain_model)
    loaded = reloaded(gain_model, tmp_path / "adapter")
    assert torch.equal(gains(loaded), gains(gain_model)) and torch.equal(logits(loaded), expected)
    assert "Gain adapter" in (tmp_path / "adapter" / "README.md").read_text()
    assert export_model(gain_model, tmp_path / "dense", "dense").ok
    assert torch.equal(logits(gain_model.merge_and_unload()), expected)


def test_another_methods_number_is_refused(gain_model, tmp_path, monkeypatch):
    gain_model.save_pretrained(tmp_path)
    monkeypatch.setattr(Gain, "number", 79)
    with pytest.raises(ValueError, match=r"method: 77\.0 in the file, 'gain' here"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_a_storage(monkeypatch, tmp_path):
    monkeypatch.setitem(STORAGES, "int16", Int16(16))
    config = DLQATConfig(bits=3, group_size=32, storage="int16", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    codes = {name: layer.quantized_weight().codes for name, layer in adapter_layers(model)[1].items()}
    pack_weights(model)
    layers = adapter_layers(model)[1]
    assert all(layer.get_base_layer().weight.dtype == torch.int16 for layer in layers.values())
    assert all(torch.equal(layer.quantized_weight().codes, codes[name]) for name, layer in layers.items())
    train(model)
    expected = logits(model)
    loaded = reloaded(model, tmp_path / "adapter")
    assert {layer.specs["default"].storage for layer in adapter_layers(loaded)[1].values()} == {"int16"}
    pack_weights(loaded)
    assert torch.equal(logits(loaded), expected)
    assert export_model(model, tmp_path / "dense", "dense").ok
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_numbers_that_saved_adapters_know_are_each_its_own():
    for parts in (METHODS, STORAGES):
        numbers = [part.number for part in parts.values()]
        assert len(set(numbers)) == len(numbers)
    assert [method.number for method in METHODS.values()] == [0, 1, 2, 3, 4]
    assert [storage.number for storage in STORAGES.values()] == [0, 8, 4, 2]
    with pytest.raises(ValueError, match="bits=3 must be 2, 4 or 8"):
        Storage(3)


def test_a_second_storage_of_as_many_bits(monkeypatch, tmp_path):
    class Shifted(Storage):
        """Another code for the same numbers."""

        def encode(self, units, codes, grid):
            return super().encode(units, codes, grid) + 1  # modulo 256

        def decode(self, packed, grid):
            return super().decode(packed - 1, grid)

    monkeypatch.setitem(STORAGES, "shifted", Shifted(8, number=99))
    model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, storage="shifted", task_type="CAUSAL_LM"))
    perturb(model)
    with pytest.warns(UserWarning, match="was trained on full weights"):
        pack_weights(model)
    expected = logits(model)
    assert torch.equal(logits(reloaded(model, tmp_path)), expected)


def test_a_layer_setting(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "damped", Damped)
    (peft_type,) = (key for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls is DLQATConfig)
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type, DampedConfig)
    with pytest.raises(ValueError, match=r"damping=0\.6 must be from 0 to 0.5"):
        DampedConfig(damping=0.6)
    model = get_peft_model(
        tiny_model(), DampedConfig(method="damped", damping=0.25, group_size=32, task_type="CAUSAL_LM")
    )
    perturb(model)
    expected = logits(model)
    for layer in adapter_layers(model)[1].values():
        assert layer.specs["default"].others["damping"] == 0.25
        assert layer.dlqat_spec["default"].tolist()[-1] == 0.25
    assert torch.equal(logits(reloaded(model, tmp_path)), expected)
    assert torch.equal(logits(model.merge_and_unload()), expected)
    config = DampedConfig.from_pretrained(tmp_path)
    config.damping = 0.5
    with pytest.raises(ValueError, match=r"damping: 0\.25 in the file, 0\.5 here"):
        PeftModel.from_pretrained(tiny_model(), tmp_path, config=config)


def test_a_layer_setting_by_module(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "damped", Damped)
    (peft_type,) = (key for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls is DLQATConfig)
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type, DampedConfig)
    own = {"method": "damped", "group_size": 32, "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match=r"damping_pattern\['q_proj'\]=0\.6 must be from 0 to 0.5"):
        DampedConfig(damping_pattern={"q_proj": 0.6})
    with pytest.raises(ValueError, match=r"damping_pattern=0\.5 must be a dict"):
        DampedConfig(damping_pattern=0.5)
    with pytest.warns(UserWarning, match=r"damping_pattern keys did not match any targeted module: \['nowhere'\]"):
        get_peft_model(tiny_model(), DampedConfig(damping_pattern={"nowhere": 0.25}, **own))
    model = get_peft_model(tiny_model(), DampedConfig(damping=0.125, damping_pattern={"q_proj": 0.25}, **own))
    perturb(model)
    expected = logits(model)
    found = {name.rpartition(".")[2]: layer.specs["default"] for name, layer in adapter_layers(model)[1].items()}
    assert {name: spec.others["damping"] for name, spec in found.items()} == {
        name: 0.25 if name == "q_proj" else 0.125 for name in found
    }
    assert torch.equal(logits(reloaded(model, tmp_path)), expected)
    config = DampedConfig.from_pretrained(tmp_path)
    assert config.damping_pattern == {"q_proj": 0.25}
    config.damping_pattern = {}
    with pytest.raises(ValueError, match=r"damping: 0\.25 in the file, 0\.125 here"):
        PeftModel.from_pretrained(tiny_model(), tmp_path, config=config)


def test_a_file_that_was_written_before_a_layer_setting_was_there_has_its_default(monkeypatch, tmp_path):
    model = get_peft_model(tiny_model(), DLQATConfig(group_size=32, task_type="CAUSAL_LM"))
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    (peft_type,) = (key for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls is DLQATConfig)
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type, DampedConfig)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)
    config = DampedConfig.from_pretrained(tmp_path)
    config.damping = 0.5
    with pytest.raises(ValueError, match=r"damping: 0 in the file, 0\.5 here"):
        PeftModel.from_pretrained(tiny_model(), tmp_path, config=config)
