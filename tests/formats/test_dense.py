"""Merged weights are exact in float32, and say what 16 bits round."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from export_models import adapted, as_id, assert_same, exported_logits, held, held_grids, merged_logits

from peft_dlqat import export_model, verify_export
from peft_dlqat.export.manifest import load_manifest, load_reference


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", held_grids("dense", (64,)), ids=as_id)
def test_dense_holds_the_merged_model_in_float32(setting, tmp_path):
    assert_same(export_model(adapted(**setting), tmp_path / "out", "dense"), "dense")


def test_dense_says_what_its_dtype_rounds(tmp_path, capsys):
    model = adapted(bits=3)
    found = export_model(model, tmp_path / "out", "dense", dtype="bfloat16")
    assert_same(found, "dense")  # as the model that was rounded so
    manifest = load_manifest(tmp_path / "out")
    assert not manifest.exact and len(manifest.rounded) > 14 and manifest.loss["kl"] > 0
    printed = capsys.readouterr().err
    assert "dense tensors rounded" in printed and f"rounded for the format: {found.loss}" in printed
    ids, trained = load_reference(tmp_path / "out")
    difference = (exported_logits(tmp_path / "out", ids) - trained).abs().max().item()
    assert 0 < found.loss.max_difference == difference < 0.1 and torch.equal(trained, merged_logits(model, ids))
    assert verify_export(tmp_path / "out") == found


@pytest.mark.parametrize("size", [16, 80, -1])
def test_what_it_holds(size):
    assert held("dense", size, torch.float32) == {*product(range(2, 9), ("none", "integer", "float"))}


def test_gpt2_through_dense(tmp_path):
    """Conv1D keeps its weight as [in, out]."""
    assert_same(export_model(adapted("gpt2", bits=4), tmp_path / "out", "dense"), "dense")
