"""TRL's trainers with DLQATCallback: two steps each, from a fresh and from a trained adapter; with TRL's reference.

Where the loss has a reference, that is the policy as the first step found it, quantized: the rounding is no reward.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trl_trainers import Start, adapted, adapter, base, losses, outputs, trainer

from peft_dlqat import DLQATCallback, calibrate
from peft_dlqat.layer import adapter_layers

# First losses where policy and reference are one; GRPO's is beta times the divergence, as advantages sum up to 0.
WITH_REFERENCE = {"dpo": math.log(2), "kto": 0.5, "grpo": 0.0}
# First losses are those of the dense model that the quantized one is.
WITHOUT = ("sft", "orpo", "reward")
QUICK = {("dpo", False), ("grpo", True), ("sft", False), ("reward", False)}


def cases(kinds: Any) -> list[Any]:
    """Each kind from a fresh and from a trained adapter; a few of them are not slow."""
    return [
        pytest.param(
            kind,
            trained,
            id=f"{kind}-{'trained' if trained else 'fresh'}",
            marks=() if (kind, trained) in QUICK else pytest.mark.slow,
        )
        for kind in kinds
        for trained in (False, True)
    ]


def train(run: Any) -> list[str]:
    """Train, and return what warnings said of calibration."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    return [str(found.message) for found in caught if "calibrat" in str(found.message)]


@pytest.mark.parametrize("kind, trained", cases(WITH_REFERENCE))
def test_the_reference_is_the_policy_as_training_found_it(kind, trained, tmp_path):
    model, start = adapted(kind, trained), Start()
    before = outputs(model)
    run = trainer(kind, model, tmp_path, start)
    said = train(run)
    assert losses(run)[0] == pytest.approx(WITH_REFERENCE[kind], abs=1e-5)
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    assert abs(first.get("rewards/margins", first.get("kl"))) < 1e-5
    # Prompts alone are nothing to calibrate on, and a trained adapter has its scales.
    calibrated = not trained and kind != "grpo"
    assert ("calibration/loss_after" in str(run.state.log_history)) == calibrated
    assert [message[:14] for message in said] == (["not calibrated"] if kind == "grpo" and not trained else [])
    assert torch.equal(start.outputs, before) == (not calibrated)
    assert not torch.equal(outputs(model), start.outputs)
    model.set_adapter("ref")
    assert torch.equal(outputs(model), start.outputs)


@pytest.mark.parametrize("kind, trained", cases(WITHOUT))
def test_the_first_loss_is_that_of_the_dense_model(kind, trained, tmp_path):
    model, start = adapted(kind, trained), Start()
    run = trainer(kind, model, tmp_path, start)
    assert train(run) == []
    assert ("calibration/loss_after" in str(run.state.log_history)) == (not trained)
    assert not torch.equal(outputs(model), start.outputs) and all(map(math.isfinite, losses(run)))
    dense = trainer(kind, start.model.merge_and_unload().requires_grad_(True), tmp_path)
    dense.remove_callback(DLQATCallback)
    dense.train()
    assert losses(run)[0] == pytest.approx(losses(dense)[0], rel=1e-5)
    full = trainer(kind, base(kind), tmp_path, max_steps=1)
    full.remove_callback(DLQATCallback)
    full.train()
    assert losses(run)[0] != pytest.approx(losses(full)[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_policy_and_reference_share_one_packed_weight(trained, tmp_path):
    model, start = adapted("dpo", trained, storage="int8"), Start()
    run = trainer("dpo", model, tmp_path, start)
    train(run)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(layer.frozen.packed for layer in adapter_layers(model)[1].values())
    assert not torch.equal(outputs(model), start.outputs)
    model.set_adapter("ref")
    assert torch.equal(outputs(model), start.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_a_reference_in_full_precision_is_had_by_peft_config(kind, tmp_path, capsys):
    """And said: with the adapter off, what rounding changes counts as reward."""
    run = trainer(kind, base(kind), tmp_path, peft_config=adapter(kind))
    train(run)
    assert list(run.model.peft_config) == ["default"]
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    assert abs(first.get("rewards/margins", first.get("kl"))) > 1e-4
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the reference is the model")]
    assert len(said) == 1 and "get_peft_model(model, config)" in said[0]


@pytest.mark.slow
def test_a_reference_that_was_run_before_keeps_the_scales(tmp_path):
    model, start = adapted("dpo", trained=False), Start()
    before = outputs(model)
    run = trainer("dpo", model, tmp_path, start, precompute_ref_log_probs=True)
    (message,) = train(run)
    assert "precompute_ref_log_probs=True" in message and "call calibrate(model, ...) before" in message
    assert torch.equal(start.outputs, before) and losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_reference(tmp_path):
    """Also where its adapter was calibrated after the reference was made."""
    torch.manual_seed(0)
    unbroken = trainer("dpo", adapted("dpo", False), tmp_path, save_strategy="steps", save_steps=1)
    unbroken.train()
    resumed = trainer("dpo", adapted("dpo", False), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert losses(resumed) == losses(unbroken)
    for name in ("default", "ref"):
        for run in (unbroken, resumed):
            run.model.set_adapter(name)
        assert torch.equal(outputs(unbroken.model), outputs(resumed.model))


def test_calibrating_leaves_another_adapter_by_that_name_alone(tmp_path):
    """Only a copy of the adapter is its reference."""
    model = adapted("dpo", trained=False)
    model.add_adapter("ref", adapter("dpo", init="minmax"))
    layers = adapter_layers(model, "ref")[1].values()
    before = [layer.scales_and_zeros("ref")[0].clone() for layer in layers]
    calibrate(model, [{"input_ids": torch.arange(3, 35)[None]}], progress=False)
    assert all(
        torch.equal(scale, layer.scales_and_zeros("ref")[0]) for scale, layer in zip(before, layers, strict=True)
    )
