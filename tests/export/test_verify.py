"""What `verify_export` is worth: it catches an artefact that is a little off, by each engine that is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_models import adapted
from transformers.utils import logging as transformers_logging

from peft_dlqat import export_model, verify_export
from peft_dlqat.export import compressed_tensors, dense, gguf, gptq, mlx
from peft_dlqat.export.engines import ENGINES
from peft_dlqat.export.gguf_model import Architecture
from peft_dlqat.export.manifest import MANIFEST, REFERENCE
from peft_dlqat.quant.quantizer import QuantizedWeight

WRITERS = {"compressed-tensors": compressed_tensors, "gguf": gguf, "mlx": mlx, "dense": dense, "gptq": gptq}
PACKAGES = {"compressed-tensors": "compressed_tensors", "gguf": "gguf", "mlx": "mlx_lm", "dense": "torch"}
SPOILED = "model.layers.1.mlp.up_proj.weight"


def scale_off_by_one_percent(weight: QuantizedWeight) -> QuantizedWeight:
    # In the dtype of the file: a bfloat16 has no value 1% away, but one 0.8% away.
    return replace(weight, scale=(1.01 * weight.scale).bfloat16().float())


def zeros_off_by_one(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, zero=(weight.zero + 1).clamp(max=weight.grid.qmax))


def rows_swapped(weight: QuantizedWeight) -> QuantizedWeight:
    order = torch.arange(weight.codes.shape[0])
    order[[5, 6]] = order[[6, 5]]
    return replace(weight, codes=weight.codes[order])


CONTROLS = {
    "scale": (scale_off_by_one_percent, "integer"),
    "zeros": (zeros_off_by_one, "integer"),
    "rows": (rows_swapped, "none"),
}


@pytest.fixture(autouse=True)
def _quiet_transformers():
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


@pytest.mark.product(every=2)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("format", PACKAGES)
def test_a_spoiled_weight_is_caught(format, control, tmp_path, monkeypatch):
    """One layer of fourteen is off; checksums are those of the spoiled file, so that only the logits can tell."""
    pytest.importorskip(PACKAGES[format])
    spoil, zero_point = CONTROLS[control]
    writer = WRITERS[format]
    fitted = writer.fitted

    def spoiled(*args):
        for entry, value in fitted(*args):
            yield entry, spoil(value) if entry.name == SPOILED else value

    model = adapted(bits=3, zero_point=zero_point)
    assert export_model(model, tmp_path / "sound", format).ok
    monkeypatch.setattr(writer, "fitted", spoiled)
    with pytest.raises(RuntimeError, match=r"the exported model is not the trained one(.|\n)*DIFFERS"):
        export_model(model, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    export_model(model, tmp_path / "out", format, verify=False)
    found = verify_export(tmp_path / "out")
    assert not found.ok and not found.changed_files
    assert all(not row.agrees and row.kl > 1e-9 for row in found.figures) and found.figures


ROUNDED = {
    "compressed-tensors": {"bits": 3, "dtype": "float16"},
    "gguf": {"bits": 3, "embeddings": "q8_0"},
    "mlx": {"bits": 3, "group_size": 16, "lossy": True},
    "dense": {"bits": 3, "dtype": "bfloat16"},
}


@pytest.mark.product(every=2)
@pytest.mark.parametrize("format", ROUNDED)
def test_a_spoiled_weight_is_caught_in_what_is_rounded(format, tmp_path, monkeypatch):
    """The loss of rounding, which is larger, does not hide it."""
    pytest.importorskip(PACKAGES[format])
    settings = dict(ROUNDED[format])
    chosen = {name: settings.pop(name) for name in ("dtype", "embeddings", "lossy") if name in settings}
    model = adapted(**settings)
    assert export_model(model, tmp_path / "sound", format, **chosen).ok
    fitted = WRITERS[format].fitted

    def spoiled(*args):
        for entry, value in fitted(*args):
            yield entry, scale_off_by_one_percent(value) if entry.name == SPOILED else value

    monkeypatch.setattr(WRITERS[format], "fitted", spoiled)
    with pytest.raises(RuntimeError, match=r"not the trained one rounded for the format(.|\n)*DIFFERS"):
        export_model(model, tmp_path / "out", format, **chosen)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{}, {"embeddings": "q8_0"}, {"dtype": "float16"}], ids=str)
def test_rows_of_q_and_k_that_are_not_permuted_are_caught(settings, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(Architecture, "row_order", lambda *_: slice(None))
    with pytest.raises(RuntimeError, match="DIFFERS"):
        export_model(adapted(bits=4), tmp_path / "out", "gguf", **settings)
    export_model(adapted(bits=4), tmp_path / "out", "gguf", verify=False, **settings)
    found = verify_export(tmp_path / "out")
    assert not found.ok and found.figures[0].kl > 1e-6


def test_changed_files_are_named(tmp_path):
    export_model(adapted(bits=4), tmp_path / "out", "dense")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x00\x01")
    (tmp_path / "out" / "generation_config.json").unlink()
    found = verify_export(tmp_path / "out")
    assert not found.ok
    assert set(found.changed_files) == {"model.safetensors", "generation_config.json"}
    assert "changed since it was written: model.safetensors" in str(found)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x80
    path.write_bytes(content)


DAMAGE = {
    "header": lambda path: flip(path, 20),
    "first byte": lambda path: flip(path, 0),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.product
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model", "config.json"])
@pytest.mark.parametrize("format", ["dense", "gguf", "mlx"])
def test_a_damaged_file_is_reported(format, name, damage, tmp_path):
    pytest.importorskip(PACKAGES[format])
    assert export_model(adapted(bits=4), tmp_path / "out", format).ok
    name = name if name != "model" else "model.gguf" if format == "gguf" else "model.safetensors"
    DAMAGE[damage](tmp_path / "out" / name)
    found = verify_export(tmp_path / "out")
    assert not found.ok and found.changed_files == (name,)
    assert found.figures and all(row.error for row in found.figures) and "cannot run it (" in str(found)


def test_a_bit_of_a_weight_is_reported(tmp_path):
    """Also where no logit shows it."""
    export_model(adapted(bits=4), tmp_path / "out", "dense", dtype="bfloat16")
    path = tmp_path / "out" / "model.safetensors"
    flip(path, path.stat().st_size // 2)
    found = verify_export(tmp_path / "out")
    assert not found.ok and found.changed_files == ("model.safetensors",)
    assert found.figures and not found.figures[0].error


@pytest.mark.parametrize("damage", ["header", "deleted"])
def test_a_damaged_reference_is_no_missing_engine(damage, tmp_path):
    export_model(adapted(bits=4), tmp_path / "out", "dense")
    DAMAGE[damage](tmp_path / "out" / REFERENCE)
    found = verify_export(tmp_path / "out")
    assert not found.ok and "the reference has changed: nothing was compared" in str(found)
    assert "installed" not in str(found)


def test_an_engine_that_fails_on_files_as_written_is_an_error(tmp_path, monkeypatch):
    """It is not they that are damaged."""
    export_model(adapted(bits=4), tmp_path / "out", "dense")
    broken = replace(ENGINES["transformers"], logits=lambda *_: 1 / 0)
    monkeypatch.setitem(ENGINES, "transformers", broken)
    with pytest.raises(ZeroDivisionError):
        verify_export(tmp_path / "out")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b'{"other": 1}'])
def test_a_damaged_manifest_is_named(content, tmp_path):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"dlqat_export.json cannot be read \(.*\); export the model again"):
        verify_export(tmp_path)


def test_nothing_compared_is_not_ok(tmp_path):
    """GPTQ's engine is not among those of the test environment."""
    found = export_model(adapted(bits=4), tmp_path / "out", "gptq")
    if not ENGINES["gptqmodel"].installed:
        assert not found.ok and "nothing was compared" in str(found)
