"""A format from outside is one object in one place: everything else knows it from there."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from export_models import adapted
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from peft_dlqat import DLQATConfig, export_formats, export_model, verify_export
from peft_dlqat.export.manifest import load_manifest, load_reference
from peft_dlqat.formats import FORMATS, Engine, Format


def toy_logits(folder, ids, load=load_file):
    """An engine that reads the toy's files, in ten lines."""
    (file,) = folder.glob("model.*")
    found = load(file)
    group = json.loads((folder / "config.json").read_text())["toy_config"]["group_size"]
    for name in [key.removesuffix(".toy_codes") for key in found if key.endswith(".toy_codes")]:
        codes, scale = found.pop(f"{name}.toy_codes"), found.pop(f"{name}.toy_scale")
        found[f"{name}.weight"] = codes.float() * scale.float().repeat_interleave(group, -1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    model.load_state_dict(found)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


class Toy(Format):
    """One byte a code, symmetric grids in groups."""

    name = "toy"
    library = "toy-lib"
    usage = "`toy run THIS_REPOSITORY`"
    engines = (Engine("toy-engine", "torch", toy_logits, largest_kl=1e-12),)

    def holds(self, grid):
        return grid.zero_point == "none" and grid.group_size != -1

    def stored_as(self, grid, dtype=torch.float32):
        return "bytes", 8 + 16 / grid.group_size

    def tensors(self, weight):
        return {"toy_codes": weight.codes, "toy_scale": weight.scale.to(self.scale_dtype(weight.grid))}

    def config(self, outline):
        return {"toy_config": {"group_size": next(iter(outline.adapted.values())).group_size}}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FORMATS, "toy", Toy())
    return FORMATS["toy"]


def test_the_config_asks_it():
    assert DLQATConfig(export=["toy"], zero_point="none").export == ["toy"]
    with pytest.raises(ValueError, match=r"toy cannot hold bits=4, .*zero_point='integer'.* use zero_point='none'"):
        DLQATConfig(export=["toy"], bits=4, zero_point="integer")


def test_the_table_has_it():
    (row,) = (row for row in export_formats(DLQATConfig(zero_point="none", group_size=32)).rows if row.format == "toy")
    assert (row.stored, row.bits_per_weight, row.problem) == ("bytes", 8.5, "")


def test_a_model_is_exported_verified_and_described(tmp_path, capsys):
    model = adapted(bits=3, zero_point="none", export=["toy"])
    found = export_model(model, tmp_path / "out", "toy", repo_id="you/toy")
    (figures,) = found.figures
    assert found.ok and figures.engine == "toy-engine" and figures.max_difference == 0.0
    ids, trained = load_reference(tmp_path / "out")
    assert torch.equal(toy_logits(tmp_path / "out", ids), trained)
    (row,) = load_manifest(tmp_path / "out").grids
    assert (row["stored"], row["weights"]) == ("bytes", 14)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("`toy run you/toy`", "library_name: toy-lib", "| toy-engine |", "stored as bytes", "(toy)"):
        assert text in card, text
    assert "14 weights, trained at 3.50 bits, are stored as bytes at 8.50" in capsys.readouterr().err


def test_what_it_does_not_hold_is_refused_with_the_formats_that_do(tmp_path):
    with pytest.raises(ValueError, match=r"toy cannot hold .* Every weight is held by 'compressed-tensors', 'gguf', "):
        export_model(adapted(bits=3, zero_point="integer"), tmp_path / "out", "toy")
    with pytest.raises(ValueError, match=r"compressed-tensors cannot .* Every weight is held by .*'toy'\."):
        export_model(adapted(bits=5, zero_point="none"), tmp_path / "out", "compressed-tensors")
    with pytest.raises(ValueError, match="toy cannot pack Conv1D layers"):
        export_model(adapted("gpt2", bits=4, zero_point="none"), tmp_path / "out", "toy")


def test_a_mistake_in_it_is_caught(tmp_path, monkeypatch, toy):
    tensors = toy.tensors
    monkeypatch.setattr(toy, "tensors", lambda weight: tensors(weight) | {"toy_codes": weight.codes.roll(1, 0)})
    with pytest.raises(RuntimeError, match=r"toy-engine: .*DIFFERS"):
        export_model(adapted(bits=3, zero_point="none"), tmp_path / "out", "toy")
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, toy):
    monkeypatch.setattr(toy, "package", "toy-package", raising=False)
    with pytest.raises(ImportError, match="format='toy' needs the package toy-package; install it"):
        export_model(adapted(bits=3, zero_point="none"), tmp_path / "out", "toy")


def test_a_container_of_its_own(tmp_path, monkeypatch, toy):
    """A format whose files are no safetensors says how they are written, and nothing else changes."""

    @contextmanager
    def writing(folder, outline, notes):
        held = {}

        def add(tensor, value):
            packed = {"weight": value} if isinstance(value, torch.Tensor) else toy.tensors(value)
            held.update({f"{tensor.module}.{name}": part for name, part in packed.items()})

        yield add
        torch.save(held, folder / "model.toy")
        notes.append("one file")

    engine = Engine("toy-engine", "torch", lambda folder, ids: toy_logits(folder, ids, torch.load), largest_kl=1e-12)
    monkeypatch.setattr(toy, "writing", writing)
    monkeypatch.setattr(toy, "files", "*.toy")
    monkeypatch.setattr(toy, "engines", (engine,))
    assert export_model(adapted(bits=3, zero_point="none"), tmp_path / "out", "toy").ok
    assert verify_export(tmp_path / "out").ok and load_manifest(tmp_path / "out").notes[-1] == "one file"
    size = (tmp_path / "out" / "model.toy").stat().st_size
    assert f"| size | {size / 1e6:,.1f} MB" in (tmp_path / "out" / "README.md").read_text()
