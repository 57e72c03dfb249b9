"""A GGUF file holds the merged model, by its own metadata."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from export_models import (
    adapted,
    as_id,
    assert_same,
    exported_logits,
    held,
    held_grids,
    merged_logits,
    needs,
)

from peft_dlqat import export_model, verify_export
from peft_dlqat.export.manifest import load_manifest, load_reference
from peft_dlqat.formats.gguf import BLOCK_TYPES
from peft_dlqat.formats.gguf_metadata import Architecture
from peft_dlqat.formats.q8_0 import round_q8_0


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", held_grids("gguf", (32, 256, -1)), ids=as_id)
def test_gguf_holds_the_merged_model(setting, tmp_path):
    needs("gguf")
    model = adapted(**setting)
    assert_same(export_model(model, tmp_path / "out", "gguf"), "gguf")
    ids, _ = load_reference(tmp_path / "out")
    # By the file's own metadata, not by config.json.
    assert torch.equal(exported_logits(tmp_path / "out", ids, gguf_file="model.gguf"), merged_logits(model, ids))


K_QUANTS = {
    "Q2_K": {"bits": 2, "zero_point": "float", "group_size": 16},
    "Q3_K": {"bits": 3, "zero_point": "none", "group_size": 16},
    "Q4_K": {"bits": 4, "zero_point": "float", "group_size": 32},
    "Q6_K": {"bits": 6, "zero_point": "none", "group_size": 16},
}


@pytest.mark.parametrize("name", K_QUANTS)
def test_gguf_holds_what_was_trained_on_a_k_quant(name, tmp_path):
    needs("gguf")
    model = adapted(**K_QUANTS[name], scale_dtype="k_quant", export=["gguf"])
    assert_same(export_model(model, tmp_path / "out", "gguf"), "gguf")
    import gguf

    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert name in kinds
    ids, _ = load_reference(tmp_path / "out")
    assert torch.equal(exported_logits(tmp_path / "out", ids, gguf_file="model.gguf"), merged_logits(model, ids))


@pytest.mark.parametrize("kind", ["gemma", "phi"])
def test_gguf_of_what_transformers_does_not_read(kind, tmp_path):
    """Its loader is no engine for these, and the export is kept."""
    needs("gguf")
    found = export_model(adapted(kind, bits=4), tmp_path / "out", "gguf")
    assert "transformers" not in [row.engine for row in found.figures]
    assert (tmp_path / "out" / "model.gguf").is_file()


def test_gpt2_through_gguf(tmp_path):
    """Conv1D keeps its weight as [in, out]; the codes are [out, in], as GGUF has them."""
    needs("gguf")
    assert_same(export_model(adapted("gpt2", bits=4), tmp_path / "out", "gguf"), "gguf")


def test_q8_0_embeddings_say_their_loss(tmp_path, capsys):
    needs("gguf")
    found = export_model(adapted(bits=3), tmp_path / "out", "gguf", embeddings="q8_0")
    assert_same(found, "gguf")
    assert 0 < found.loss.kl < 1e-2
    manifest = load_manifest(tmp_path / "out")
    assert sorted(manifest.rounded) == ["lm_head.weight", "model.embed_tokens.weight"]
    full = tmp_path / "full"
    export_model(adapted(bits=3), full, "gguf", verify=False)
    assert (full / "model.gguf").stat().st_size > (tmp_path / "out" / "model.gguf").stat().st_size + 90_000


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "q8_0"])
def test_what_a_narrower_type_holds_is_written_in_it(kind, tmp_path):
    """As of a base of 16 bits, or of a GGUF file, that was loaded in float32."""
    needs("gguf")
    from gguf import GGUFReader

    model = adapted("tied", bits=4, zero_point="none")
    weight = model.get_input_embeddings().weight
    weight.data[0, 0] = 1e-6  # of which float16 has few digits
    weight.data = round_q8_0(weight.data) if kind == "q8_0" else weight.data.to(getattr(torch, kind)).float()
    found = export_model(model, tmp_path / "out", "gguf")
    assert found.ok and found.loss is None and not load_manifest(tmp_path / "out").rounded
    served = [row.served for row in found.figures if row.served is not None]
    assert all(row.kl < 1e-3 for row in served)
    (tensor,) = (row for row in GGUFReader(tmp_path / "out" / "model.gguf").tensors if row.name == "token_embd.weight")
    assert tensor.tensor_type.name == {"bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}[kind]
    wide = export_model(model, tmp_path / "wide", "gguf", dtype="float32", verify=False)
    assert wide is None
    more = (tmp_path / "wide" / "model.gguf").stat().st_size - (tmp_path / "out" / "model.gguf").stat().st_size
    assert more >= weight.numel() * 2 - 64


@pytest.mark.parametrize("settings", [{}, {"embeddings": "q8_0"}, {"dtype": "float16"}], ids=str)
def test_rows_of_q_and_k_that_are_not_permuted_are_caught(settings, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(Architecture, "row_order", lambda *_: slice(None))
    with pytest.raises(RuntimeError, match="DIFFERS"):
        export_model(adapted(bits=4), tmp_path / "out", "gguf", **settings)
    export_model(adapted(bits=4), tmp_path / "out", "gguf", verify=False, **settings)
    found = verify_export(tmp_path / "out")
    assert not found.ok and found.figures[0].kl > 1e-6


def test_the_smallest_type_is_ternary():
    assert min(BLOCK_TYPES, key=lambda kind: kind.bits_per_weight).name == "TQ2_0"


@pytest.mark.parametrize("path, name", [("a/folder/some-model", "some-model"), ("", "llama")])
def test_the_file_has_the_models_name_or_its_architectures(path, name, tmp_path):
    GGUFReader = pytest.importorskip("gguf").GGUFReader
    model = adapted(bits=4)
    model.get_base_model().name_or_path = path
    export_model(model, tmp_path / "out", "gguf", verify=False)
    assert GGUFReader(tmp_path / "out" / "model.gguf").fields["general.name"].contents() == name


@pytest.mark.parametrize("size", [32, 256, -1])
def test_what_it_holds(size):
    """Without a zero Q8_0 has a level for each code, beside a zero point one less; with an offset Q5_1."""
    expected = {*product(range(2, 9), ["none"]), *product(range(2, 8), ["integer"]), *product(range(2, 6), ["float"])}
    assert held("gguf", size, torch.float16) == held("gguf", size, torch.bfloat16) == expected
    assert held("gguf", size, torch.float32) == held("gguf", 80, torch.float16) == set()
