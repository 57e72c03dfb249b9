"""Calibration by blocks: what it gains, and what it leaves alone."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import HIDDEN, VOCAB, computing, lm_batches, random_model, tiny_model
from peft import get_peft_model
from torch import nn
from transformers import BloomConfig, FalconConfig, OpenAIGPTConfig

import peft_dlqat.decoder
import peft_dlqat.train.descent
from peft_dlqat import DLQATConfig, calibrate, distillation_loss
from peft_dlqat.decoder import NoDecoderLayers
from peft_dlqat.layer import adapter_layers
from peft_dlqat.running import teacher_logits
from peft_dlqat.train.recipe import RECIPE

KINDS = ("llama", "gpt2", "opt")
GRID = {"dlqat_scale", "dlqat_zero_point", "dlqat_offset"}
ADAPTER = {"dlqat_A", "dlqat_B", "dlqat_magnitude"}


def config(**changes):
    return DLQATConfig(**{"bits": 2, "group_size": 32, "init": "minmax", "task_type": "CAUSAL_LM", **changes})


def adapted(kind="llama", **changes):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(kind), config(**changes))


def run(model, steps=20, batches=None, **arguments):
    """Calibrates by the decoder layers' own outputs; returns their errors."""
    batches = lm_batches() if batches is None else batches
    result = calibrate(model, batches, steps, by="blocks", objective="output", progress=False, **arguments)
    assert (result.steps, result.by, result.objective) == (steps, "blocks", "output")
    return list(result.blocks)


@torch.no_grad()
def heldout_kl(model):
    batch = lm_batches(20, batch=8)[-1]
    model.eval()
    return distillation_loss(model(**batch).logits, teacher_logits(model, batch)).item()


def state(model):
    return {name: tensor.clone() for name, tensor in computing(model).items()}


def moved(model, before):
    return {
        name.removesuffix(".weight").split(".")[-2]
        for name, tensor in computing(model).items()
        if not torch.equal(tensor, before[name])
    }


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_each_layers_error_and_the_models_divergence_fall(kind, zero_point):
    # The random model's "mse" grid leaves so little to gain that a few hundred tokens are not enough to show it.
    model = adapted(kind, zero_point=zero_point, init="minmax")
    before, divergence = state(model), heldout_kl(model)
    errors = run(model, steps=40)
    assert len(errors) == 2 and all(error.after < 0.97 * error.before for error in errors)
    assert all(isinstance(model.get_submodule(error.name), nn.Module) for error in errors)
    assert heldout_kl(model) < divergence
    assert moved(model, before) <= GRID and "dlqat_scale" in moved(model, before)


SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "base",
    [
        BloomConfig(**SIZES),
        FalconConfig(**SIZES),
        OpenAIGPTConfig(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=["bloom", "falcon", "openai-gpt"],
)
def test_layers_that_return_a_tuple_or_a_list(base):
    model = get_peft_model(random_model(base), config(init="minmax"))
    divergence = heldout_kl(model)
    errors = run(model, steps=40)
    assert len(errors) == 2 and all(error.after < 0.97 * error.before for error in errors)
    assert heldout_kl(model) < divergence


def test_the_first_error_is_the_layers_on_its_initial_scales():
    """Against the layers run by hand; the second layer's input comes from the calibrated first."""
    model = adapted()
    batches = lm_batches()

    @torch.no_grad()
    def error(index):
        outputs = []
        hook = model.get_submodule(f"base_model.model.model.layers.{index}").register_forward_hook(
            lambda *args: outputs.append(args[-1])
        )
        for batch in batches:
            model(**batch)
            with model.disable_adapter():
                model(**batch)
        hook.remove()
        return torch.stack([(a - b).square().mean() for a, b in zip(outputs[::2], outputs[1::2], strict=True)]).mean()

    model.eval()
    first = error(0).item()
    errors = run(model)
    assert errors[0].before == pytest.approx(first, rel=1e-4)
    assert errors[0].after == pytest.approx(error(0).item(), rel=1e-4)
    assert errors[1].after == pytest.approx(error(1).item(), rel=1e-4)


@pytest.mark.parametrize("zero_point, also", [("integer", set()), ("float", {"dlqat_shift"})])
def test_the_adapter_is_fitted_on_request_and_gains_more(zero_point, also):
    alone, both = adapted(zero_point=zero_point), adapted(zero_point=zero_point)
    before = state(both)
    without, with_adapter = run(alone, steps=20), run(both, steps=20, train_adapter=True)
    assert all(a.after > b.after for a, b in zip(without, with_adapter, strict=True))
    assert (ADAPTER | also).issubset(moved(both, before))


def test_the_adapter_is_fitted_alike_whatever_the_size_of_the_weights():
    """v_proj / 32 and o_proj * 32 are the same function."""
    ends = []
    for factor in (1.0, 32.0):
        base = tiny_model()
        for layer in base.model.layers:
            layer.self_attn.v_proj.weight.data /= factor
            layer.self_attn.o_proj.weight.data *= factor
        torch.manual_seed(0)
        model = get_peft_model(base, config(bits=2, target_modules=["v_proj", "o_proj"]))
        ends.append([error.after for error in run(model, steps=15, train_adapter=True)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_weights_are_packed_as_by_calibrate_but_not_under_an_adapter_that_was_fitted():
    model = adapted(storage="int8")
    run(model, steps=2)
    assert all(layer.frozen.packed for layer in adapter_layers(model)[1].values())
    with pytest.raises(ValueError, match=r"train_adapter=True with storage='int8'.*leave one of the two out"):
        run(adapted(storage="int8"), train_adapter=True)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_the_frozen_grid_is_one_that_ships(zero_point):
    model = adapted(zero_point=zero_point)
    run(model, steps=5)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if ".dlqat_scale." in name:
            assert torch.equal(tensor, tensor.bfloat16().float())
        if ".dlqat_zero_point." in name:
            assert torch.equal(tensor, tensor.round())


def test_a_layer_whose_error_does_not_fall_keeps_its_initial_scales():
    model = adapted(init="minmax")  # which does not look at the inputs
    before = state(model)
    errors = run(model, steps=2, lr=10.0, train_adapter=True)
    assert all(error.after == error.before for error in errors)
    assert moved(model, before) == set()


def test_without_steps_the_grid_is_fitted_to_the_inputs():
    model = adapted(init="mse")
    before = state(model)
    errors = run(model, steps=0)
    assert all(error.after <= error.before for error in errors) and errors[0].after < errors[0].before
    assert moved(model, before) <= GRID


def test_random_numbers_modes_and_flags_are_left_alone():
    model = adapted()
    model.train()
    model.base_model.model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    run(model, steps=3, train_adapter=True)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(buffer.requires_grad or buffer.grad is not None for buffer in model.buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.base_model.model.model.layers)


@pytest.mark.parametrize("train_adapter", [False, True])
def test_an_exception_puts_every_layer_back(train_adapter, monkeypatch, tmp_path):
    """At a step of the second layer, when the first one is calibrated already."""
    model = adapted()
    model.train()
    before, steps = state(model), itertools.count()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def check(value, *_):
        if next(steps) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(peft_dlqat.train.descent, "check_finite", check)
    with pytest.raises(KeyboardInterrupt):
        run(model, steps=10, train_adapter=train_adapter, cache_dir=tmp_path)
    assert moved(model, before) == set() and model.training
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_finite_is_refused_and_the_grid_put_back():
    model = adapted()
    before = state(model)
    embedding = model.get_input_embeddings().weight.data
    embedding[5] = torch.nan
    batches = [{"input_ids": torch.full((2, 8), 5)}]
    with pytest.raises(FloatingPointError, match="put back"):
        run(model, steps=2, batches=batches)
    embedding.copy_(before["base_model.model.model.embed_tokens.weight"])
    assert moved(model, before) == set()


def test_hidden_states_on_disk_give_the_same_and_leave_nothing(tmp_path):
    in_memory, on_disk = (adapted(zero_point="none", init="mse") for _ in range(2))
    assert run(in_memory, steps=5) == run(on_disk, steps=5, cache_dir=tmp_path)
    expected = in_memory.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in on_disk.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.product
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind, side):
    """Rows padded with two different tokens give the same grid."""
    grids = []
    for filler in (3, 4):
        batches = lm_batches(2, length=8)
        place = slice(0, 3) if side == "left" else slice(5, 8)
        for batch in batches:
            batch["input_ids"][:, place], batch["attention_mask"][:, place] = filler, 0
        model = adapted(kind, zero_point="none", init="mse")
        errors = run(model, steps=4, batches=batches)
        assert all(np.isfinite(error.after) for error in errors)
        grids.append(model.state_dict())
    assert all(torch.allclose(tensor, grids[1][name], rtol=1e-5) for name, tensor in grids[0].items())


def test_bfloat16_and_adapters_injected_by_transformers():
    model = tiny_model(dtype=torch.bfloat16)
    model.add_adapter(config())
    errors = run(model, steps=20)
    assert [error.name for error in errors] == ["model.layers.0", "model.layers.1"]
    assert all(error.after < error.before for error in errors)


def test_only_layers_with_the_adapter_are_calibrated():
    model = adapted(layers_to_transform=[1])
    errors = run(model, steps=5)
    assert [error.name for error in errors] == ["base_model.model.model.layers.1"]


def test_calls_are_kept_on_the_cpu_each_tensor_once():
    """A mask and position embeddings are the same tensors for all layers, and many batches of them take room."""

    class Elsewhere(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

    mask, angle = torch.ones(2, 4).as_subclass(Elsewhere), torch.ones(3).as_subclass(Elsewhere)
    calls = [((mask,), {"position_embeddings": (angle, angle), "use_cache": False}) for _ in range(3)]
    found = peft_dlqat.decoder._on_cpu(calls)
    tensors = [x for args, kwargs in found for x in (*args, *kwargs["position_embeddings"])]
    assert all(type(tensor) is torch.Tensor for tensor in tensors) and len(set(map(id, tensors))) == 2
    assert all(kwargs["use_cache"] is False and isinstance(args, tuple) for args, kwargs in found)


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Residual(nn.Module):
    """A list of layers, but something happens between them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("kind", [Perceptron, Residual])
def test_a_model_without_decoder_layers_is_refused(kind):
    model = get_peft_model(kind(), DLQATConfig(bits=2, group_size=32, target_modules=["first", "0", "1"]))
    before = state(model)
    with pytest.raises(NoDecoderLayers, match=r"use calibrate\(\) with by='model'"):
        run(model, steps=2, batches=[{"x": torch.randn(4, 32)}])
    assert issubclass(NoDecoderLayers, ValueError) and moved(model, before) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps=-1 must be"),
        ({"steps": True}, "steps=True must be"),
        ({"lr": -1.0}, "lr=-1.0 must be"),
        ({"batches": []}, "no calibration batches"),
        ({"batches": [{"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.zeros(2, 4)}]}, "masks are 0"),
        ({"batches": [torch.zeros(2, 2)]}, "batch is a Tensor"),
        ({"adapter_name": "other"}, "no DL-QAT adapter 'other'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(adapted(), **{"batches": lm_batches(1), "steps": 2, **arguments})


def test_a_merged_or_inactive_adapter_is_refused():
    model = adapted()
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match="must be the active one"):
        run(model, adapter_name="other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        run(model)


def test_steps_are_the_recipes_by_default(monkeypatch):
    monkeypatch.setattr("peft_dlqat.train.calibrate.RECIPE", replace(RECIPE, block_steps=7))
    assert calibrate(adapted(), lm_batches(1), by="blocks", objective="output", progress=False).blocks == tuple(
        run(adapted(), steps=7, batches=lm_batches(1))
    )


def test_the_adapter_is_fitted_by_every_way_that_steps_go():
    for by in ("model", "blocks"):
        model = adapted(init="minmax")
        before = state(model)
        result = calibrate(model, lm_batches(), steps=10, by=by, train_adapter=True, progress=False)
        assert result.kept == "after" and moved(model, before) > ADAPTER
        assert len(result.blocks) == (2 if by == "blocks" else 0)
        assert not any(tensor.requires_grad for tensor in model.buffers())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "output"}, "objective='output' is each decoder layer's own error; add by='blocks'"),
        ({"cache_dir": "cache"}, "cache_dir='cache' keeps hidden states, which only by='blocks' has"),
    ],
)
def test_what_only_blocks_have_is_refused_on_the_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(adapted(), lm_batches(1), progress=False, **arguments)


def test_log_is_called_after_each_step():
    """Steps count on over the decoder layers; the rate falls anew in each, and so does the loss."""
    seen = []
    calibrate(adapted(), lm_batches(), steps=3, by="blocks", lr=0.03, log=lambda *of: seen.append(of), progress=False)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [values["calibration/lr"] for _, values in seen] == pytest.approx(2 * [0.03, 0.02, 0.01])
    assert all(values["calibration/loss"] > 0 for _, values in seen)
