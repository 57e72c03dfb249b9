"""What `verify_export` is worth: it catches an artefact that is a little off, by each engine that is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_models import ENGINE_MODULES, adapted
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from peft_dlqat import export_model, verify_export
from peft_dlqat.export import export as exporting
from peft_dlqat.export.manifest import MANIFEST, REFERENCE, load_manifest
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
    with pytest.raises(
        RuntimeError, match=r"does not find the trained one in the exported model(.|\n)*DIFFERS"
    ) as error:
        export_model(model, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    # The files are kept, with what was found.
    kept = tmp_path / "out.unproven"
    assert str(kept) in str(error.value)
    found = verify_export(kept)
    assert not found.ok and not found.changed_files
    assert all(not row.agrees and row.kl > 1e-9 for row in found.figures) and found.figures
    assert (kept / "dlqat_export" / "report.txt").read_text(encoding="utf-8") == f"{found}\n"
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


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
    with pytest.raises(RuntimeError, match=r"not find the trained one rounded for the format(.|\n)*DIFFERS"):
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


def test_added_files_are_named(tmp_path):
    """An engine may read them, as transformers does an adapter; the card is the user's, hidden files are others'."""
    export_model(adapted(bits=4), tmp_path / "out", "dense")
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "out" / ".gitattributes").touch()
    (tmp_path / "out" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "out" / ".cache" / "huggingface" / "CACHEDIR.TAG").touch()
    assert verify_export(tmp_path / "out").ok
    (tmp_path / "out" / "code").mkdir()
    for name in ("code/model.py", "adapter_config.json"):
        (tmp_path / "out" / name).write_text("{}")
    found = verify_export(tmp_path / "out", engines=[])
    assert not found.ok and found.added_files == ("adapter_config.json", "code/model.py") and not found.changed_files
    assert "added since it was written: code/model.py" in str(found)


def test_the_hubs_cache_of_links_is_an_export(tmp_path):
    """It keeps files elsewhere, and links to them."""
    export_model(adapted(bits=4), tmp_path / "out", "dense", verify=False)
    (tmp_path / "blobs").mkdir()
    file = tmp_path / "out" / "model.safetensors"
    file.rename(tmp_path / "blobs" / "1")
    file.symlink_to(tmp_path / "blobs" / "1")
    assert verify_export(tmp_path / "out").ok


@pytest.mark.parametrize("tensors", [{}, {"logits": torch.zeros(2, 3, 4)}, {"input_ids": torch.ones(2, 3).long()}])
def test_a_reference_of_no_prompts_is_named(tensors, tmp_path):
    """Though its checksum is the manifest's."""
    export_model(adapted(bits=4), tmp_path / "out", "dense", verify=False)
    save_file(tensors, tmp_path / "out" / REFERENCE)
    load_manifest(tmp_path / "out").save(tmp_path / "out")
    with pytest.raises(ValueError, match=r"reference.safetensors holds no prompts with the logits"):
        verify_export(tmp_path / "out")


def test_a_manifest_without_a_reference_shows_nothing(tmp_path):
    export_model(adapted(bits=4), tmp_path / "out", "dense", verify=False)
    content = json.loads((tmp_path / "out" / MANIFEST).read_text())
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({**content, "files": {}}))
    found = verify_export(tmp_path / "out")
    assert not found.ok and found.changed_files == (REFERENCE,) and "model.safetensors" in found.added_files


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
    assert any(row.error for row in found.figures) and "cannot run it (" in str(found)
    # llama.cpp reads no config.json.
    assert all(row.error for row in found.figures if (row.engine, name) != ("llama.cpp", "config.json"))


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


def test_an_engine_that_cannot_run_throws_no_file_away(tmp_path, monkeypatch):
    """A second export takes the place of the first one's files, and of nothing else."""
    monkeypatch.setattr(FORMATS["dense"], "engines", (replace(TRANSFORMERS, logits=lambda *_: 1 / 0),))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"transformers: cannot run it \(ZeroDivisionError(.|\n)*out.unproven"):
            export_model(adapted(bits=4), tmp_path / "out", "dense")
    monkeypatch.undo()
    found = verify_export(tmp_path / "out.unproven")
    assert found.ok and not found.changed_files
    (tmp_path / "out.unproven" / MANIFEST).unlink()
    monkeypatch.setattr(FORMATS["dense"], "engines", (replace(TRANSFORMERS, logits=lambda *_: 1 / 0),))
    with pytest.raises(FileExistsError, match=r"out.unproven"):
        export_model(adapted(bits=4), tmp_path / "out", "dense")


def test_logits_that_are_all_off_by_one_number_are_caught(tmp_path, monkeypatch):
    """KL does not see it."""
    (engine,) = FORMATS["dense"].engines
    wrong = replace(engine, logits=lambda *args: engine.logits(*args) + 3.0, largest_kl=1e-3)
    monkeypatch.setattr(FORMATS["dense"], "engines", (wrong,))
    with pytest.raises(RuntimeError, match=r"max difference 3, KL (0|\d.*e-\d+) nats a token, top-1 100.0%  DIFFERS"):
        export_model(adapted(bits=4), tmp_path / "out", "dense")


class Half(torch.nn.Module):
    """GELU from float16 to float16."""

    def forward(self, x):
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@pytest.mark.parametrize(
    ("kind", "own"), [("llama", {"dense_dtype": torch.float16}), ("gpt2", {"gelu": Half().forward})]
)
def test_an_engine_is_held_to_its_own_arithmetic(kind, own, tmp_path, monkeypatch):
    """One that rounds dense tensors, or GELU, is not held to logits that it cannot have, nor let off."""
    base = FORMATS["dense"].engines[0]

    def rounded(folder, ids):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for tensor in model.parameters() if "dense_dtype" in own else ():
            tensor.data = tensor.data.half().float()
        for block in getattr(model.base_model, "h", ()):
            block.mlp.act = Half()
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    monkeypatch.setattr(FORMATS["dense"], "engines", (replace(base, logits=rounded, dense_dtype=None),))
    with pytest.raises(RuntimeError, match="DIFFERS"):
        export_model(adapted(kind, bits=4), tmp_path / "out", "dense")
    monkeypatch.setattr(FORMATS["dense"], "engines", (replace(base, logits=rounded, **own),))
    found = export_model(adapted(kind, bits=4), tmp_path / "out", "dense")
    assert found.ok and found.figures[0].kl < 1e-10


def manifest(**changes):
    fields = {"format": "dense", "base": "", "base_checksum": "", "grids": [], "exact": True}
    return json.dumps({**fields, **changes}).encode()


DAMAGED = {
    "no text": b"\xff\xfe",
    "no JSON": b"{",
    "other fields": b'{"other": 1}',
    "no object": b"[]",
    "too deep": b"[" * 100_000,
    "no format": manifest(format=["dense"]),
    "no files": manifest(files=["model.safetensors"]),
    "no checksum": manifest(files={"model.safetensors": 3}),
    "a path out": manifest(files={"../secret": ""}),
    "a path out, further down": manifest(files={"a/../../secret": ""}),
    "a path out, backwards": manifest(files={"..\\secret": ""}),
    "an absolute path": manifest(files={"/etc/passwd": ""}),
    "a path on a drive": manifest(files={"C:secret": ""}),
    "no path": manifest(files={"": ""}),
    "a long path": manifest(files={"x" * 300: ""}),
    "a loss of text": manifest(loss={"max_difference": "3", "kl": 0.0, "top1": 1.0}),
    "another loss": manifest(loss={"kl": 0.0}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_manifest_is_named(damage, tmp_path):
    (tmp_path / MANIFEST).write_bytes(DAMAGED[damage])
    with pytest.raises(ValueError, match=r"dlqat_export.json cannot be read \(.*\); export the model again"):
        verify_export(tmp_path)


@pytest.mark.parametrize("spoilt", [manifest(format="x" * 10**6), manifest(**{"x" * 10**6: 1})])
def test_a_damaged_manifest_is_not_quoted_at_length(spoilt, tmp_path):
    (tmp_path / MANIFEST).write_bytes(spoilt)
    with pytest.raises(ValueError, match=r"dlqat_export\.json") as refused:
        verify_export(tmp_path)
    assert len(str(refused.value)) < 1000


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
