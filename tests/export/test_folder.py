"""The exported folder: all of it or nothing, with what belongs beside the weights, and what it says of itself."""

from __future__ import annotations

import errno
import json
import shutil
import warnings

import pytest
from conftest import say_calibrated
from export_models import EMBEDDED, adapted
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from peft_dlqat import export_model
from peft_dlqat.export import export as exporting
from peft_dlqat.export import folder
from peft_dlqat.export.manifest import load_manifest
from peft_dlqat.files import sha256_of
from peft_dlqat.formats import tensor_files


@pytest.mark.parametrize("format", ["dense", "gguf", "compressed-tensors"])
def test_a_full_disk_leaves_nothing(format, tmp_path, monkeypatch):
    """The error comes after half of the files have been written."""
    pytest.importorskip({"gguf": "gguf", "compressed-tensors": "compressed_tensors"}.get(format, "torch"))

    def full(*_args, **_kwargs):
        assert any(tmp_path.rglob("config.json")), "nothing had been written yet"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "save_reference", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(adapted(bits=4), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_folder_to_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    for name in ("notes.txt", "dlqat_export.json"):
        (tmp_path / "out" / name).write_text("mine")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(adapted(bits=4), tmp_path / "out", "dense", overwrite=True)
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "notes.txt", "dlqat_export.json"}
    monkeypatch.undo()
    export_model(adapted(bits=4), tmp_path / "out", "dense", overwrite=True, verify=False)
    assert not (tmp_path / "out" / "notes.txt").exists() and (tmp_path / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dlqat_export.json").write_text("mine")
    rename = folder.os.rename

    def busy(source, target):
        if source.name == "new":
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(folder.os, "rename", busy)
    with pytest.raises(OSError, match="busy"):
        export_model(adapted(bits=4), tmp_path / "out", "dense", overwrite=True, verify=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "dlqat_export.json"]
    assert (tmp_path / "out" / "dlqat_export.json").read_text() == "mine"


def test_only_an_export_is_overwritten(tmp_path):
    """The adapter itself, say, is not."""
    model = adapted(bits=4)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="only replaces what was exported before"):
        export_model(model, tmp_path / "adapter", "dense", overwrite=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_working_folder_and_a_link_to_nowhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_model(adapted(bits=4), ".", "dense", verify=False)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    export_model(adapted(bits=4), tmp_path / "link", "dense", verify=False)
    assert (tmp_path / "here" / "config.json").is_file() and (tmp_path / "there" / "config.json").is_file()


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    export_model(adapted(bits=4), tmp_path / "out", "dense", verify=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_untrained_adapter_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"never trained .* rounded to nearest"):
        export_model(adapted(trained=False, bits=4), tmp_path / "out", "dense", verify=False)


def test_an_uncalibrated_adapter_warns(tmp_path):
    model = adapted(bits=4)
    say_calibrated(model, False)
    with pytest.warns(UserWarning, match=r"never calibrated.*init='minmax'"):
        export_model(model, tmp_path / "out", "dense", verify=False)


def test_a_trained_one_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_model(adapted(bits=4), tmp_path / "out", "dense", verify=False)


def test_tokenizer_generation_config_and_licence_travel(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED, base)
    (base / "LICENSE.txt").write_text("Do as you like.")
    adapted("embedded", bits=3).save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "out", "dense", base=base, dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_given_tokenizer_replaces_the_base_models(tmp_path):
    """All its files: a stale tokenizer.model or chat template would be preferred to what was given."""
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED, base)
    for name in ("tokenizer.model", "chat_template.jinja", "vocab.json", "added_tokens.json", "LICENSE.txt"):
        (base / name).write_text("the base model's")
    adapted("embedded", bits=4).save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "given")
    export_model(
        tmp_path / "adapter", tmp_path / "out", "dense", base=base, tokenizer=tokenizer, dtype="bfloat16", verify=False
    )
    for path in (tmp_path / "given").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "LICENSE.txt").is_file()
    for name in ("tokenizer.model", "vocab.json", "added_tokens.json"):
        assert not (tmp_path / "out" / name).exists()


def test_companions_are_those_of_the_revision(tmp_path, monkeypatch):
    """As the weights are."""
    model = adapted("embedded", bits=4)
    model.get_base_model().name_or_path = "some/model"
    model.peft_config["default"].revision = "v2"
    asked = []
    monkeypatch.setattr(
        folder, "snapshot_download", lambda base, **settings: asked.append((base, settings["revision"])) or EMBEDDED
    )
    export_model(model, tmp_path / "out", "dense", verify=False)
    assert asked == [("some/model", "v2")] and (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_card_names_base_grid_licence_and_figures(tmp_path):
    export_model(adapted("embedded", bits=3), tmp_path / "out", "dense", dtype="bfloat16", datasets="you/stories")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["you/stories"]
    assert card.data.license_name == "psf-2.0" and "dlqat" in card.data.tags
    for text in (
        "trained at 3 bits",
        "| fine-tuned on | you/stories |",
        "bits=3, group_size=32",
        "bits a parameter",
        "| transformers |",
    ):
        assert text in card.text, text


def test_the_manifest_says_what_is_there(tmp_path):
    model = adapted(bits=3, target_modules=["q_proj"])
    export_model(model, tmp_path / "out", "dense")
    content = json.loads((tmp_path / "out" / "dlqat_export.json").read_text())
    assert content["format"] == "dense" and content["exact"] and content["versions"]["torch"]
    assert content["grids"] == [
        {
            "grid": "bits=3, group_size=32, zero_point='none', scale_dtype='bfloat16'",
            "stored": "float32",
            "trained": "bits=3, group_size=32, zero_point='none', scale_dtype='bfloat16'",
            "weights": 2,
        }
    ]
    assert len(content["dense_linears"]) == 12
    listed = content["files"]
    for path in (tmp_path / "out").rglob("*"):
        name = str(path.relative_to(tmp_path / "out"))
        if path.is_file() and name not in ("dlqat_export.json", "README.md"):
            assert listed.pop(name) == sha256_of(path)
    assert not listed
    assert load_manifest(tmp_path / "out").figures[0]["max_difference"] == 0.0


def test_manifest_and_card_say_the_grid_that_is_written(tmp_path):
    """Where grids differ and have zero points, compressed-tensors has the widest for all."""
    pytest.importorskip("compressed_tensors")
    model = adapted(bits=3, zero_point="integer", bits_pattern={"q_proj": 4})
    export_model(model, tmp_path / "out", "compressed-tensors", verify=False)
    rows = load_manifest(tmp_path / "out").grids
    assert all("bits=4, group_size=32" in row["grid"] and "int4" in row["stored"] for row in rows), rows
    (other,) = (row for row in rows if row["trained"] != row["grid"])
    assert other["trained"].startswith("bits=3, ")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{other['grid']}, stored as {other['stored']}; trained on {other['trained']} |" in card


def test_it_is_pushed_whole(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(exporting, "HfApi", Api)
    export_model(
        adapted(bits=4), tmp_path / "out", "dense", verify=False, push_to_hub=True, repo_id="you/model", private=True
    )
    assert calls[0] == ("create", "you/model", True, True)
    assert {"README.md", "config.json", "dlqat_export.json", "model.safetensors"} <= set(calls[1][2])
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("you/model")' in card and "THIS_REPOSITORY" not in card
