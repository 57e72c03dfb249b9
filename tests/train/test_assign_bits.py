"""Where bits go: to the layers that the output depends on, within the size that is asked for."""

from __future__ import annotations

import pytest
import torch
from conftest import computing, lm_batches, tiny_model
from peft import get_peft_model

from peft_dlqat import DLQATConfig, assign_bits, calibrate, evaluate_model, summarize
from peft_dlqat.layer import adapter_layers

SETTINGS = {"group_size": 32, "zero_point": "none", "r": 4, "task_type": "CAUSAL_LM"}


def mean_bits(model) -> float:
    """Of the adapted weights, with their scales."""
    grids = {layer: layer.specs["default"].grid for layer in adapter_layers(model)[1].values()}
    weights = {layer: layer.in_features * layer.out_features for layer in grids}
    return sum(grid.bits_per_weight() * weights[layer] for layer, grid in grids.items()) / sum(weights.values())


def adapted(model, **config):
    return get_peft_model(model, DLQATConfig(**SETTINGS, **config))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bits_are_spent_and_the_model_is_left_as_it_was(kind):
    model = tiny_model(kind)
    before = computing(model)
    bits = assign_bits(model, lm_batches(1), DLQATConfig(**SETTINGS), target_bits=4.2, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in computing(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert len(set(bits.values())) > 1
    model = adapted(model, bits_pattern=bits)
    # What is left is less than the smallest group would take one more bit for.
    assert 4.0 < mean_bits(model) <= 4.2
    for name, own in bits.items():
        assert model.get_base_model().get_submodule(name).specs["default"].grid.bits == own


def test_layers_that_read_the_same_input_get_the_same():
    """Llama's q, k and v, gate and up; a model that hands o_proj and down_proj tensors of their own."""
    bits = assign_bits(tiny_model(), lm_batches(1), DLQATConfig(**SETTINGS), target_bits=3.9, progress=False)
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({bits[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({bits[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    assert len(bits) == 14


def test_a_layer_that_nothing_depends_on_gets_the_fewest():
    model = tiny_model()
    for name in ("o_proj", "q_proj", "k_proj", "v_proj"):
        model.model.layers[1].self_attn.get_submodule(name).weight.data *= 1e-4
    bits = assign_bits(model, lm_batches(1), DLQATConfig(**SETTINGS), target_bits=4.0, progress=False)
    assert {bits[f"model.layers.1.self_attn.{name}_proj"] for name in "qkvo"} == {2}
    assert max(bits.values()) > 4


def test_the_output_changes_less_than_with_as_many_bits_everywhere():
    batches, kl = lm_batches(2), {}
    config = DLQATConfig(bits=3, **SETTINGS)
    bits = assign_bits(tiny_model(), batches, config, target_bits=3.5, progress=False)
    for name, pattern in (("uniform", {}), ("assigned", bits)):
        model = adapted(tiny_model(), bits=3, bits_pattern=pattern)
        assert mean_bits(model) <= 3.5
        calibrate(model, batches, steps=0, progress=False)
        kl[name] = evaluate_model(model, batches).kl
    assert kl["assigned"] < kl["uniform"]


def test_padding_does_not_count():
    padded = [{**batch, "attention_mask": batch["attention_mask"].clone()} for batch in lm_batches(1)]
    padded[0]["attention_mask"][:, 8:] = 0
    other = [{**padded[0], "input_ids": padded[0]["input_ids"].clone()}]
    other[0]["input_ids"][:, 8:] = 5
    config = DLQATConfig(**SETTINGS)
    found = [assign_bits(tiny_model(), batches, config, 3.7, progress=False) for batches in (padded, other)]
    assert found[0] == found[1]


def test_bits_are_counted_as_the_file_keeps_them():
    """GGUF holds fewer bits in the next wider type, so the wider grid costs nothing; MLX holds all but 7."""
    for export, held in ((["gguf"], {4, 5, 8}), (["mlx", "compressed-tensors"], {2, 3, 4, 5, 6, 8})):
        config = DLQATConfig(**SETTINGS, export=export)
        bits = assign_bits(tiny_model(), lm_batches(1), config, target_bits=6.0, progress=False)
        model = adapted(tiny_model(), bits_pattern=bits)
        assert set(bits.values()) <= held
        (file,) = summarize(model, formats=export[:1]).files
        assert 5.5 < file.bits_per_weight <= 6.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target_bits": 2.4}, "target_bits=2.4 is below the 2.50 bits a weight"),
        ({"batches": []}, "batches is empty"),
        ({"choices": []}, "choices is empty"),
        ({"choices": [1]}, "bits=1"),
        ({"model": lambda: adapted(tiny_model(), bits=3)}, "has adapters already"),
        ({"config": DLQATConfig(target_modules=["nowhere"])}, "nowhere"),
    ],
)
def test_refused(arguments, message):
    given = {"model": tiny_model, "batches": lm_batches(1), "config": DLQATConfig(**SETTINGS), "target_bits": 3.5}
    given |= arguments
    given["model"] = given["model"]()
    with pytest.raises(ValueError, match=message):
        assign_bits(**given, progress=False)


def test_weights_that_lie_on_a_grid_count_at_fewer_bits():
    """At their own bits nothing is lost, which says nothing of what fewer would lose."""
    model, settings = tiny_model(), {**SETTINGS, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
    on_grid = get_peft_model(tiny_model(), DLQATConfig(bits=4, **settings)).merge_and_unload()
    for name, module in on_grid.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "down_proj")):
            model.get_submodule(name).weight.data = module.weight.data
    bits = assign_bits(model, lm_batches(1), DLQATConfig(**settings), target_bits=4.5, progress=False)
    assert set(bits.values()) == {4}


def test_a_layer_that_no_token_reaches_is_told_of():
    model = tiny_model()
    model.model.extra = torch.nn.Linear(64, 64)
    with pytest.warns(UserWarning, match="no token of the batches reached model.extra"):
        bits = assign_bits(model, lm_batches(1), DLQATConfig(**SETTINGS), target_bits=3.9, progress=False)
    assert bits["model.extra"] == 2
