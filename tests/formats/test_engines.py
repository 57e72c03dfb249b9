"""Exported models in gptqmodel, which `make test-engines` builds."""

from __future__ import annotations

import pytest
import torch
from conftest import perturb
from export_models import adapted, as_id, held_grids

from peft_dlqat import DLQATConfig, export_model, load_quantized, verify_export


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", held_grids("gptq", (32, 128, -1)), ids=as_id)
def test_gptqmodel_finds_the_trained_model(setting, dtype, tmp_path):
    """It keeps what is not quantized in float16, whatever the base model has it in."""
    pytest.importorskip("gptqmodel")
    export_model(adapted("embedded", dtype=dtype, **setting), tmp_path / "out", "gptq", verify=False)
    (found,) = verify_export(tmp_path / "out", engines=["gptqmodel"]).figures  # it wants the model's tokenizer
    assert found.agrees and found.kl < 1e-9, str(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", held_grids("awq", (32, 128, -1)), ids=as_id)
def test_gptqmodel_finds_the_trained_model_in_awq(setting, tmp_path):
    pytest.importorskip("gptqmodel")
    export_model(adapted("embedded", **setting), tmp_path / "out", "awq", verify=False)
    (found,) = verify_export(tmp_path / "out", engines=["gptqmodel"]).figures
    assert found.agrees and found.kl < 1e-9, str(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("format", "bits"), [("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_gptqmodel_finds_what_was_trained_inside_a_folder(format, bits, tmp_path):
    pytest.importorskip("gptqmodel")
    model = adapted("embedded", bits=bits, zero_point="integer")
    export_model(model, tmp_path / "source", format, verify=False)
    model, _ = load_quantized(tmp_path / "source", DLQATConfig(r=4, task_type="CAUSAL_LM"))
    perturb(model)
    export_model(model, tmp_path / "out", format, verify=False)
    (found,) = verify_export(tmp_path / "out", engines=["gptqmodel"]).figures
    assert found.agrees and found.kl < 1e-9, str(found)
