"""What a model is asked for while nothing trains."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model, tokens
from peft import get_peft_model
from transformers import LlamaModel

from peft_dlqat import DLQATConfig
from peft_dlqat.layer import adapter_layers
from peft_dlqat.running import teacher_logits, temporarily_merged


def adapted(base, **settings):
    return get_peft_model(base, DLQATConfig(bits=3, group_size=32, init="minmax", **settings))


def test_a_model_without_logits_is_refused():
    model = adapted(LlamaModel(tiny_model().config))
    with pytest.raises(ValueError, match="BaseModelOutputWithPast without logits; use objective='task'"):
        teacher_logits(model, {"input_ids": tokens(1, 4)})


@torch.no_grad()
def test_layers_are_merged_for_a_while_where_their_adapter_is_active():
    model = adapted(tiny_model(), layers_to_transform=[0]).eval()
    model.add_adapter("other", DLQATConfig(bits=2, group_size=32, init="minmax", layers_to_transform=[1]))
    layers = {**adapter_layers(model, "default")[1], **adapter_layers(model, "other")[1]}
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    expected = model(tokens(1, 4)).logits
    with temporarily_merged(model):
        assert {name for name, layer in layers.items() if layer.merged} == {*adapter_layers(model, "default")[1]}
        assert torch.equal(model(tokens(1, 4)).logits, expected)
    assert all(layer.get_base_layer().weight is weights[name] for name, layer in layers.items())
