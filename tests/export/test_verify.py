"""What `verify_export` is worth: it catches an artefact that is a little off, by each engine that is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_models import ENGINE_MODULES, adapted

from peft_dlqat import export_model, verify_export
from peft_dlqat.export import export as exporting
from peft_dlqat.export.manifest import MANIFEST, REFERENCE
from peft_dlqat.formats import FORMATS
from peft_dlqat.formats.engines import TRANSFORMERS
from peft_dlqat.quant.quantizer import QuantizedWeight

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


def spoil_what_is_written(monkeypatch, spoil) -> None:
    """Let one layer of fourteen be written otherwise than it is; what the engines are held to stays as it is."""
    write = exporting._write

    def spoiled_write(source, *rest):
        read = source.read
        source.read = lambda names=None: (
            (tensor, spoil(value) if tensor.name == SPOILED else value) for tensor, value in read(names)
        )
        try:
            return write(source, *rest)
        finally:
            del source.read

    monkeypatch.setattr(exporting, "_write", spoiled_write)


@pytest.mark.product(every=2)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("format", ENGINE_MODULES)
def test_a_spoiled_weight_is_caught(format, control, tmp_path, monkeypatch):
    """Checksums are those of the spoiled file, so that only the logits can tell."""
    pytest.importorskip(ENGINE_MODULES[format])
    spoil, zero_point = CONTROLS[control]
    model = adapted(bits=3, zero_point=zero_point)
    assert export_model(model, tmp_path / "sound", format).ok
    spoil_what_is_written(monkeypatch, spoil)
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
    "mlx": {"bits": 3, "dtype": "float16"},
    "dense": {"bits": 3, "dtype": "bfloat16"},
}


@pytest.mark.product(every=2)
@pytest.mark.parametrize("format", ROUNDED)
def test_a_spoiled_weight_is_caught_in_what_is_rounded(format, tmp_path, monkeypatch):
    """The loss of rounding, which is larger, does not hide it."""
    pytest.importorskip(ENGINE_MODULES[format])
    settings = dict(ROUNDED[format])
    chosen = {name: settings.pop(name) for name in ("dtype", "embeddings") if name in settings}
    model = adapted(**settings)
    assert export_model(model, tmp_path / "sound", format, **chosen).ok
    spoil_what_is_written(monkeypatch, scale_off_by_one_percent)
    with pytest.raises(RuntimeError, match=r"not the trained one rounded for the format(.|\n)*DIFFERS"):
        export_model(model, tmp_path / "out", format, **chosen)
    assert not (tmp_path / "out").exists()


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
    pytest.importorskip(ENGINE_MODULES[format])
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
    monkeypatch.setattr(FORMATS["dense"], "engines", (replace(TRANSFORMERS, logits=lambda *_: 1 / 0),))
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
    if not FORMATS["gptq"].engines[0].installed:
        assert not found.ok and "nothing was compared" in str(found)


def test_a_format_that_is_no_longer_there_is_named(tmp_path, monkeypatch):
    export_model(adapted(bits=4), tmp_path / "out", "dense", verify=False)
    monkeypatch.delitem(FORMATS, "dense")
    with pytest.raises(ValueError, match=r"format='dense', which must be one of .*; add it to peft_dlqat.formats"):
        verify_export(tmp_path / "out")


def test_engines_are_chosen_by_name(tmp_path, monkeypatch):
    export_model(adapted(bits=4), tmp_path / "out", "dense")
    other = replace(TRANSFORMERS, name="other", logits=lambda *_: 1 / 0)
    monkeypatch.setattr(FORMATS["dense"], "engines", (TRANSFORMERS, other))
    found = verify_export(tmp_path / "out", engines=["transformers"])
    assert found.ok and len(found.figures) == 1
    with pytest.raises(ValueError, match=r"engines=\['vllm'\] are not installed.*use \['transformers', 'other'\]"):
        verify_export(tmp_path / "out", engines=["vllm"])
