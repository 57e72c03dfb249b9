"""A LoRA script's arguments: each is taken, or explained."""

import warnings
from dataclasses import fields

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model

from peft_dlqat import DLQATConfig
from peft_dlqat.layer import adapter_layers

TAKEN = [
    ({"lora_dropout": 0.0, "use_dora": False, "layer_replication": None, "loftq_config": {}}, {}),
    ({"fan_in_fan_out": True}, {}),
    ({"init_lora_weights": True}, {"init_weights": True}),
    ({"init_lora_weights": False}, {"init_weights": False}),
    ({"bias": "lora_only"}, {"bias": "dlqat_only"}),
    ({"r": 4, "lora_alpha": 16, "use_rslora": True}, {"r": 4, "lora_alpha": 16, "use_rslora": True}),
    ({"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}),
]
EXPLAINED = [
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': .*merge the other adapter first"),
    ({"use_dora": True}, "use_dora=True: .*magnitude='row' has one a row"),
    ({"use_qalora": True}, "use_qalora=True: use method='qalora'"),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=.*modules_to_save=\['embed_tokens'\]"),
    ({"target_parameters": ["experts.up"]}, "target_parameters=.*stacked experts"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying=True: a tied weight"),
    ({"layer_replication": [(0, 2)]}, "layer_replication=.*one grid"),
    ({"lora_bias": True}, "lora_bias=True: this is LoRA's own"),
]


@pytest.mark.parametrize(("arguments", "expected"), TAKEN)
def test_an_argument_is_taken(arguments, expected):
    config = DLQATConfig(bits=3, **arguments)
    assert {name: getattr(config, name) for name in expected} == expected
    assert DLQATConfig.from_lora(LoraConfig(**arguments), bits=3).to_dict() == {
        **config.to_dict(),
        "peft_version": DLQATConfig().peft_version,
    }


@pytest.mark.parametrize(("arguments", "says"), EXPLAINED)
def test_an_argument_is_explained(arguments, says):
    with pytest.raises(ValueError, match=says):
        DLQATConfig(bits=3, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own of some
        lora = LoraConfig(**arguments)
    with pytest.warns(UserWarning, match=f"left out of the LoRA config: .*{says}"):
        assert DLQATConfig.from_lora(lora, bits=3).bits == 3


def test_dropout_is_left_out_with_a_warning():
    """Nearly every LoRA script has it."""
    with pytest.warns(UserWarning, match=r"lora_dropout=0.05: there is no input of BA alone"):
        config = DLQATConfig(bits=3, lora_dropout=0.05)
    assert not hasattr(config, "lora_dropout")


def test_every_argument_of_loras_is_taken_or_explained():
    """Whatever PEFT's version has."""
    taken = {entry.name for entry in fields(DLQATConfig)} | {"fan_in_fan_out", "megatron_core", "lora_dropout"}
    for name in {entry.name for entry in fields(LoraConfig)} - taken:
        with pytest.raises(ValueError, match=f"{name}='other': "):
            DLQATConfig(**{name: "other"})


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'bit'"):
        DLQATConfig(bit=3)


def test_a_script_changed_in_one_line_adapts_the_same_modules():
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    expected = {name for name, _ in get_peft_model(tiny_model(), lora).named_modules() if name.endswith("lora_A")}
    model = get_peft_model(tiny_model(), DLQATConfig.from_lora(lora, bits=3, group_size=32))
    layers = adapter_layers(model)[1]
    assert {f"{name}.lora_A" for name in layers} == expected
    assert all(layer.specs["default"].scaling == 2 for layer in layers.values())
    assert {tuple(layer.dlqat_A["default"].shape) for layer in layers.values()} == {(4, 64)}
    assert torch.isfinite(model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits).all()
