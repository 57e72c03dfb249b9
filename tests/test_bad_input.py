"""Bad input is refused early, by a message with value, rule and remedy, and changes nothing.

The table of cases is in bad_input.py. Below it are the odd inputs that must work.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from bad_input import (
    CALIBRATING_CASES,
    CONFIG_CASES,
    EXPORTING_CASES,
    INJECTING_CASES,
    LOADING,
    PAGE,
    QUANTIZED,
    REGENERATE,
    RUNNING_CASES,
    WAYS,
    BadFile,
    Case,
    Net,
    adapted,
    edit_config,
    harm,
    net_config,
    outputs,
    page,
    small_config,
    snapshot,
    write_bad_file,
)
from conftest import lm_batches, perturb, tiny_model
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.utils import logging as transformers_logging

from peft_dlqat import DLQATConfig, calibrate
from peft_dlqat.layer import DLQATLayer


@pytest.fixture(autouse=True)
def _quiet_transformers():
    """Transformers reports mismatched tensors by its log, in a long table."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


def refuse(case: Case, folder: Path) -> None:
    """Runs a case: the right error, the right words, nothing changed."""
    attempt = case.attempt(folder)
    before = snapshot(attempt.model, folder)
    with pytest.raises(case.error) as caught:
        attempt.call()
    message = str(caught.value)
    missing = [words for words in case.says if words not in message]
    assert not missing, f"{message!r} does not say {missing}"
    after = snapshot(attempt.model, folder)
    damage = harm(before, after) if case.keeps_model else [] if before.files == after.files else ["files"]
    assert not damage, f"the refused call changed {damage}"


def as_params(cases: list[Case]) -> list:
    """The cases as pytest takes them."""
    return [pytest.param(case, id=case.input) for case in cases]


@pytest.mark.parametrize("case", as_params(CONFIG_CASES))
def test_config_is_refused(case, tmp_path):
    """Impossible values never become a config."""
    refuse(case, tmp_path)


@pytest.mark.parametrize("case", as_params(INJECTING_CASES))
def test_injection_is_refused(case, tmp_path):
    """All targets are checked before any is replaced."""
    refuse(case, tmp_path)


@pytest.mark.parametrize("case", as_params(CALIBRATING_CASES))
def test_calibration_is_refused(case, tmp_path):
    """Buffers, requires_grad flags, train or eval mode and random number generators are as before."""
    refuse(case, tmp_path)


@pytest.mark.parametrize("case", as_params(RUNNING_CASES))
def test_running_or_merging_is_refused(case, tmp_path):
    """A refused forward pass, merge or request for codes leaves the model as it was."""
    refuse(case, tmp_path)


@pytest.mark.parametrize("case", as_params(EXPORTING_CASES))
def test_export_is_refused(case, tmp_path):
    """A refused export leaves the model as it was, and nothing on disk."""
    refuse(case, tmp_path)


@pytest.mark.parametrize("case", as_params([case for *_, case in LOADING]))
def test_saved_adapter_is_refused(case, tmp_path):
    """A bad file is refused in each way of loading; an adapter that was there before is as it was."""
    refuse(case, tmp_path)


@pytest.mark.parametrize("change", ["weight", "module", "flag", "mode", "file", "seed"])
def test_harm_is_noticed(change, tmp_path):
    """Each kind of damage is seen by the comparison that the tests above rely on."""
    model = Net()
    (tmp_path / "file").write_text("1")
    before = snapshot(model, tmp_path)
    assert harm(before, snapshot(model, tmp_path)) == []
    if change == "weight":
        model.first.weight.data[0, 0] += 1
    elif change == "module":
        model.second = nn.Sequential(model.second)
    elif change == "flag":
        model.first.weight.requires_grad_(False)
    elif change == "mode":
        model.first.eval()
    elif change == "file":
        (tmp_path / "file").write_text("2")
    else:
        torch.rand(1)
    assert harm(before, snapshot(model, tmp_path)) != []


# ---------------------------------------------------------------------------------------------------------------------
# Odd, but to be accepted


def test_default_group_adapts_with_one_warning():
    """The default of 128 becomes 64 on in_features=64, and one warning lists all such layers."""
    with pytest.warns(UserWarning, match="group_size does not divide") as caught:
        model = get_peft_model(tiny_model(), DLQATConfig(init="minmax"))
    about_groups = [str(warning.message) for warning in caught if "group_size" in str(warning.message)]
    assert len(about_groups) == 1
    assert "128 -> 64" in about_groups[0]
    sizes = {
        layer.in_features: layer.specs["default"].grid.group_size
        for layer in model.modules()
        if isinstance(layer, DLQATLayer)
    }
    assert sizes == {64: 64, 128: 128}


@pytest.mark.parametrize("way", ["from_pretrained", "from_pretrained, low_cpu_mem_usage", "load_adapter"])
def test_negative_scale_of_a_symmetric_grid_loads(way, tmp_path):
    """The scale of a symmetric grid is signed: half of them are negative, and the logits are those saved."""
    good = adapted("none")
    scale = torch.cat([layer.dlqat_scale["default"].flatten() for layer in dlqat_layers(good)])
    assert 0.2 < (scale < 0).float().mean() < 0.8
    good.save_pretrained(tmp_path / "adapter")
    base = tiny_model()
    attempt = WAYS[way](BadFile("", lambda files: None, ()), tmp_path / "adapter")
    loaded = attempt.call()
    model = attempt.model if way == "load_adapter" else loaded
    if way == "load_adapter":
        model.set_adapter("second")
    assert outputs(model).isfinite().all()
    assert not torch.equal(outputs(model), outputs(base))
    assert torch.equal(outputs(model), outputs(good))


def test_unknown_key_in_a_saved_config_is_named(tmp_path):
    """A config of a later version loads, and PEFT's warning names the key that was left out."""
    bad = BadFile("", edit_config(bits_per_head=3), ())
    folder = write_bad_file(bad, tmp_path)
    with pytest.warns(UserWarning, match="bits_per_head"):
        config = DLQATConfig.from_pretrained(str(folder))
    assert config.bits == 4


def dlqat_layers(model: nn.Module) -> list[DLQATLayer]:
    return [module for module in model.modules() if isinstance(module, DLQATLayer)]


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_zero_rows_stay_zero(zero_point, scale_dtype):
    """A row, group or weight of zeros is exactly zero until it is trained, and all but zero then; nothing is NaN."""
    for bits, init, dtype in itertools.product((2, 3, 4, 8), ("mse", "minmax"), (torch.float32, torch.bfloat16)):
        if dtype == torch.bfloat16 and bits != 3:
            continue
        torch.manual_seed(0)
        base = Net()
        base.first.weight.data[3] = 0  # a row
        base.first.weight.data[5, 16:] = 0  # a group
        base.second.weight.data[:] = 0  # everything
        base = base.to(dtype)
        zero = {name: base.get_submodule(name).weight == 0 for name in ("first", "second")}
        config = DLQATConfig(
            bits=bits,
            init=init,
            group_size=16,
            zero_point=zero_point,
            scale_dtype=scale_dtype,
            target_modules=["first", "second"],
        )
        model = get_peft_model(base, config)
        layers = {name: model.base_model.model.get_submodule(name) for name in zero}

        def check(stage, layers=layers, zero=zero, setting=(bits, init, dtype)):
            for name, layer in layers.items():
                weight = layer.quantized_weight().dequantize()
                assert weight.isfinite().all(), (stage, name, setting)
                largest = 2 ** setting[0] * 2.0**-14 if stage == "trained" else 0.0  # of the step of zeros
                assert weight[zero[name]].abs().max() <= largest, (stage, name, setting)

        check("initialised")
        batches = [{"input_ids": batch["input_ids"], "labels": batch["labels"]} for batch in lm_batches(2, 2, 8)]
        result = calibrate(model, batches, steps=3, lr=0.05, objective="task", progress=False)
        assert result.loss_after == result.loss_after
        check("calibrated")
        # As create_dlqat_optimizer: m is not decayed. A zero has no gradient of its own.
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0)
        for batch in batches * 2:
            optimizer.zero_grad()
            loss = model(**batch).loss
            assert loss.isfinite()
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert gradients
            assert all(gradient.isfinite().all() for gradient in gradients)
            optimizer.step()
        check("trained")
        trained = outputs(model)
        merged = model.merge_and_unload(safe_merge=True)
        assert torch.equal(outputs(merged), trained)
        for name, entries in zero.items():
            assert merged.get_submodule(name).weight[entries].abs().max() <= 2**bits * 2.0**-14


# ---------------------------------------------------------------------------------------------------------------------
# Two adapters at once


def two_adapters() -> PeftModel:
    """A tiny Llama with a 4-bit adapter and, on fewer layers and another grid, a 3-bit one."""
    model = adapted()
    model.add_adapter("second", small_config(bits=3, zero_point="float", target_modules=["q_proj", "v_proj"]))
    perturb(model, seed=2)
    return model.eval()


def test_two_adapters_add_their_differences():
    """y = x @ (W0 + sum(w_hat_i - W0)).T, layer by layer, and a warning says that this lies on no grid."""
    model = two_adapters()
    with pytest.warns(UserWarning, match="lies on no grid"):
        model.base_model.set_adapter(["default", "second"])
    counts = set()
    for layer in dlqat_layers(model):
        names = sorted(layer.specs)
        counts.add(len(names))
        w0 = layer.frozen.original().double()
        weight = w0 + sum(layer.quantized_weight(name).dequantize().double() - w0 for name in names)
        x = torch.randn(5, layer.in_features)
        expected = x.double() @ weight.t()
        with torch.no_grad():
            error = (layer(x) - expected).abs().max() / expected.abs().max()
        assert error < 1e-6
        single = x.double() @ layer.quantized_weight(names[0]).dequantize().double().t()
        if len(names) == 2:  # the comparison could tell
            assert (single - expected).abs().max() / expected.abs().max() > 1e-3
    assert counts == {1, 2}


@pytest.mark.parametrize("one_by_one", [False, True])
def test_two_adapters_merge_and_unmerge(one_by_one):
    """Merged, both at once or one after the other, they give the sum; unmerged, W0 is the very tensor that it was."""
    model = two_adapters()
    layers = dlqat_layers(model)
    with pytest.warns(UserWarning, match="lies on no grid"):
        model.base_model.set_adapter(["default", "second"])
    before = [(layer.get_base_layer().weight.data_ptr(), layer.frozen.original().clone()) for layer in layers]
    together = outputs(model)
    if one_by_one:
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging second"):
            model.merge_adapter(["second"])
    else:
        model.merge_adapter()
    assert (outputs(model) - together).abs().max() < 1e-5 * together.abs().max()
    for layer in layers:
        names = sorted(layer.specs)
        differences = (layer.quantized_weight(name).dequantize() - layer.frozen.original() for name in names)
        expected = layer.frozen.original() + sum(differences)
        torch.testing.assert_close(layer.get_base_layer().weight.data, expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    for layer, (pointer, weight) in zip(layers, before, strict=True):
        assert layer.get_base_layer().weight.data_ptr() == pointer
        assert torch.equal(layer.get_base_layer().weight, weight)
    assert torch.equal(outputs(model), together)


@pytest.mark.parametrize("kind", list(QUANTIZED))
def test_layer_does_not_merge_into_a_quantized_base(kind):
    """A layer whose base was quantized after the adapter was put in refuses to merge, and is as it was."""
    model = get_peft_model(Net(), net_config())
    layer = model.base_model.model.second
    layer.base_layer = QUANTIZED[kind]()
    before = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
    with pytest.raises(TypeError, match=r"cannot merge into .* quantized already"):
        layer.merge()
    assert not layer.merged
    after = layer.base_layer.state_dict()
    assert before.keys() == after.keys()
    assert all(type(t) is type(after[n]) and t.dtype == after[n].dtype for n, t in before.items())


def test_errors_page_is_up_to_date():
    """docs/errors.md holds the messages that are really raised."""
    assert PAGE.is_file(), f"docs/errors.md is missing; write it by `{REGENERATE}`"
    assert PAGE.read_text(encoding="utf-8") == page(), (
        f"docs/errors.md is out of date; write it anew by `{REGENERATE}`"
    )
