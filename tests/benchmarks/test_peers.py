"""The peers of the methods benchmark: each ends on the grid, and does what its paper says it does for."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import lm_batches, tiny_model

from peft_dlqat import DLQATConfig, distillation_loss
from peft_dlqat.quant.grid import Grid

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "methods"))

from peers import common, gptq, loftq, lora_rtn, lsq, rtn

CONFIGS = [
    DLQATConfig(bits=3, group_size=-1, zero_point="float"),
    DLQATConfig(bits=2, group_size=32, zero_point="float"),
    DLQATConfig(bits=3, group_size=32, zero_point="integer"),
    DLQATConfig(bits=2, group_size=32, zero_point="none"),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.bits}bit-{c.group_size}-{c.zero_point}")
BATCHES = [{"input_ids": batch["input_ids"]} for batch in lm_batches(4)]


def levels_in_use(model, config) -> int:
    """The most distinct weights that a group has."""
    counts = [
        len(group.unique())
        for layer in common.linear_layers(model).values()
        for group in common.grid_of(config, layer).group(layer.weight.detach()).flatten(0, 1)
    ]
    return max(counts)


def divergence(model) -> float:
    """KL to the full-precision model over the batches."""
    reference = tiny_model()
    with torch.no_grad():
        losses = [distillation_loss(model(**batch).logits, reference(**batch).logits) for batch in BATCHES]
    return torch.stack(losses).mean().item()


def train(prepared, steps: int = 30, lr: float = 3e-3) -> None:
    groups = [{"params": group["params"], "lr": lr * group["lr_factor"]} for group in prepared.parameters]
    optimizer = torch.optim.Adam(groups)
    targets = [tiny_model()(**batch).logits.detach() for batch in BATCHES]
    for step in range(steps):
        loss = distillation_loss(prepared.model(**BATCHES[step % 4]).logits, targets[step % 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("config", [*CONFIGS, DLQATConfig(bits=2, bits_pattern={"down_proj": 3}, group_size=32)])
def test_rounding_to_nearest_is_what_an_untrained_adapter_does(config):
    from peft import get_peft_model

    expected = get_peft_model(tiny_model(), config).merge_and_unload().state_dict()
    for name, weight in rtn.quantize(tiny_model(), config).state_dict().items():
        assert torch.equal(weight, expected[name]), name


@each_config
def test_gptq_beats_rounding_to_nearest_on_the_same_grid(config):
    quantized = gptq.quantize(tiny_model(), config, BATCHES)
    assert levels_in_use(quantized, config) <= 2**config.bits
    assert divergence(quantized) < divergence(rtn.quantize(tiny_model(), config))


def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest():
    grid = Grid(3, 16, "float", torch.bfloat16)
    weight = torch.randn(8, 64)
    rounded = common.round_to(weight, *common.fit(weight, grid, "mse"), grid)
    assert torch.equal(gptq.gptq(weight, torch.eye(64, dtype=torch.float64), grid, "mse"), rounded)


def test_second_moments_are_those_of_the_inputs():
    model = tiny_model()
    name = "model.layers.0.self_attn.q_proj"
    layers = {name: common.linear_layers(model)[name]}
    hidden = torch.cat(
        [model.model.layers[0].input_layernorm(model.model.embed_tokens(b["input_ids"])) for b in BATCHES]
    ).flatten(0, 1)
    expected = (hidden.T @ hidden / len(hidden)).double()
    with torch.no_grad():
        torch.testing.assert_close(gptq.second_moments(model, layers, BATCHES)[name], expected, rtol=1e-4, atol=1e-6)


def test_a_decoder_layer_is_the_name_up_to_the_first_index():
    assert gptq.decoder_layer("model.layers.3.mlp.experts.1.up_proj") == "model.layers.3"


@each_config
@pytest.mark.parametrize("name", ["lsq", "loftq", "torchao_qat_lora"])
def test_training_lowers_the_divergence_and_ends_on_the_grid(name, config):
    if name == "torchao_qat_lora":
        pytest.importorskip("torchao")
    prepared = importlib.import_module(f"peers.{name}").prepare(tiny_model(), config)
    before = divergence(prepared.model)
    train(prepared)
    trained = divergence(prepared.model)
    assert trained < 0.8 * before
    final = prepared.finish()
    assert levels_in_use(final, config) <= 2**config.bits
    assert sum("lora" in key or "parametrizations" in key for key in final.state_dict()) == 0
    assert divergence(prepared.model) == trained, "finish() changed the model in training"
    if prepared.unmerged is None:
        assert divergence(final) == pytest.approx(trained, rel=1e-4)  # what was trained is what ships
    else:
        assert divergence(prepared.unmerged()) == pytest.approx(trained, rel=0.05)  # but for A and B in 16 bits


@each_config
def test_lsq_starts_at_rounding_to_nearest(config):
    start = lsq.prepare(tiny_model(), config).finish().state_dict()
    for name, weight in rtn.quantize(tiny_model(), config).state_dict().items():
        assert torch.equal(start[name], weight), name


def test_lsq_gradients_are_those_of_the_papers():
    grid = Grid(2, 4, "float", torch.float32)
    quantizer = lsq.FakeQuantize(torch.tensor([[0.0, 0.5, 1.0, 1.5]]), grid)
    scale, offset = quantizer.scale.item(), quantizer.offset.item()
    weight = torch.tensor([[-2.0, 0.2, 0.9, 9.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (quantizer(weight) * upstream).sum().backward()
    u = (weight.detach() - offset) / scale
    inside = (u > 0) & (u < 3)
    to_scale = torch.where(inside, u.round() - u, u.clamp(0, 3))
    share = 1 / (4 * 3) ** 0.5
    torch.testing.assert_close(weight.grad, upstream * inside)
    torch.testing.assert_close(quantizer.log_step.grad.squeeze(), share * scale * (upstream * to_scale).sum())
    torch.testing.assert_close(quantizer.shift.grad.squeeze(), share * scale * (upstream * ~inside).sum())


def test_lora_then_rounding_rounds_what_was_trained():
    config = CONFIGS[0]
    prepared = lora_rtn.prepare(tiny_model(), config)
    assert divergence(prepared.model) == 0
    for parameter in prepared.parameters[0]["params"]:
        parameter.data += 0.05 * torch.randn_like(parameter)
    merged = rtn.quantize(lora_rtn.merged(prepared.model), config).state_dict()
    final = prepared.finish()
    assert levels_in_use(final, config) <= 8
    assert all(torch.equal(weight, merged[name]) for name, weight in final.state_dict().items())
    assert divergence(final) != divergence(rtn.quantize(tiny_model(), config))


@each_config
def test_loftq_starts_closer_to_the_weights_than_rounding_alone(config):
    weights, rounded = tiny_model().state_dict(), rtn.quantize(tiny_model(), config).state_dict()
    start = loftq.merged(loftq.prepare(tiny_model(), config).model).state_dict()
    for name in common.linear_layers(tiny_model()):
        key = f"{name}.weight"
        assert (start[key] - weights[key]).norm() < 0.95 * (rounded[key] - weights[key]).norm(), name


def test_loftq_gains_by_taking_turns(monkeypatch):
    grid, weight = Grid(2, 32, "float", torch.bfloat16), torch.randn(48, 64)

    def error() -> float:
        quantized, A, B = loftq.alternate(weight, grid, r=8)
        return (quantized + B @ A - weight).norm().item()

    after_all = error()
    monkeypatch.setattr(loftq, "TURNS", 1)
    assert after_all < 0.99 * error()


@pytest.mark.slow
def test_autoround_beats_rounding_to_nearest():
    pytest.importorskip("auto_round")
    autoround = importlib.import_module("peers.autoround")
    config = CONFIGS[0]
    quantized = autoround.quantize(tiny_model(), config, BATCHES, steps=10)
    assert levels_in_use(quantized, config) <= 8
    assert divergence(quantized) < divergence(rtn.quantize(tiny_model(), config))


def test_weights_off_the_grid_are_named():
    config = CONFIGS[0]
    model = rtn.quantize(tiny_model(), config)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 of 128 groups off every grid of 8"):
        common.check_levels(model, config)


def test_too_many_levels_are_off_the_grid():
    model = rtn.quantize(tiny_model(), DLQATConfig(bits=4, group_size=-1))
    with pytest.raises(ValueError, match="off every grid of 8 levels"):
        common.check_levels(model, DLQATConfig(bits=3, group_size=-1))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no torch\.nn\.Linear beside its head"):
        rtn.quantize(tiny_model("gpt2"), CONFIGS[0])


def test_gptq_takes_other_architectures():
    quantized = gptq.quantize(tiny_model("opt"), CONFIGS[0], BATCHES)
    assert levels_in_use(quantized, CONFIGS[0]) <= 8


def test_groups_by_pattern():
    """A `group_size_pattern` counts as it does for the package's own adapters."""
    config = DLQATConfig(bits=3, group_size=32, group_size_pattern={"down_proj": 64})
    sizes = {
        name.rpartition(".")[2]: common.grid_of(config, layer).group_size
        for name, layer in common.linear_layers(tiny_model()).items()
    }
    assert sizes.pop("down_proj") == 64 and set(sizes.values()) == {32}
