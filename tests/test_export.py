"""Exported models are the trained ones: each engine that is installed finds the merged model's logits."""

from __future__ import annotations

import itertools

import pytest
import torch
from export_models import adapted, merged_logits
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from peft_dlqat import export_model
from peft_dlqat.export.manifest import load_reference
from peft_dlqat.formats import RULES


@pytest.fixture(autouse=True)
def _quiet_transformers():
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


pytestmark = [
    # compressed-tensors and transformers, on loading quantized weights
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def grids(name: str, sizes: tuple[int, ...]) -> list[dict[str, object]]:
    """All grids with some group sizes that a format holds."""
    settings = [
        {"bits": bits, "group_size": size, "zero_point": zero_point}
        for bits, size, zero_point in itertools.product((2, 3, 4, 8), sizes, ("none", "integer", "float"))
    ]
    config = adapted_grid
    return [setting for setting in settings if RULES[name].holds(config(setting))]


def adapted_grid(setting):
    from peft_dlqat import Grid

    return Grid(setting["bits"], setting["group_size"], setting["zero_point"], torch.bfloat16)


def as_id(setting) -> str:
    return "-".join(str(value) for value in setting.values())


def exported_logits(folder, ids, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("setting", grids("compressed-tensors", (32, 128, -1)), ids=as_id)
def test_compressed_tensors_holds_the_merged_model(setting, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = adapted(**setting)
    found = export_model(model, tmp_path / "out", "compressed-tensors")
    assert found.ok and found.figures[0].max_difference == 0.0
    ids, reference = load_reference(tmp_path / "out")
    assert torch.equal(reference, merged_logits(model, ids))
    assert torch.equal(exported_logits(tmp_path / "out", ids), reference)


@pytest.mark.parametrize("setting", grids("gguf", (32, 256, -1)), ids=as_id)
def test_gguf_holds_the_merged_model(setting, tmp_path):
    pytest.importorskip("gguf")
    model = adapted(**setting)
    found = export_model(model, tmp_path / "out", "gguf")
    assert found.ok and found.figures[0].max_difference == 0.0
    ids, _ = load_reference(tmp_path / "out")
    # By the file's own metadata, not by config.json.
    assert torch.equal(exported_logits(tmp_path / "out", ids, gguf_file="model.gguf"), merged_logits(model, ids))
