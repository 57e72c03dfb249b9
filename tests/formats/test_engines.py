"""Exported models in gptqmodel, which `make test-engines` builds."""

from __future__ import annotations

import pytest
import torch
from export_models import adapted, as_id, held_grids

from peft_dlqat import export_model, verify_export


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", held_grids("gptq", (32, 128, -1)), ids=as_id)
def test_gptqmodel_finds_the_trained_model(setting, dtype, tmp_path):
    """It keeps what is not quantized in float16, whatever the base model has it in."""
    pytest.importorskip("gptqmodel")
    export_model(adapted("embedded", dtype=dtype, **setting), tmp_path / "out", "gptq", verify=False)
    (found,) = verify_export(tmp_path / "out", engines=["gptqmodel"]).figures  # it wants the model's tokenizer
    assert found.agrees and found.kl < 1e-9, str(found)
