"""Files that others may read as the user has it, and folders that are whole or not there."""

from __future__ import annotations

import os

import pytest
import torch
from export_models import adapted
from filelock import FileLock
from safetensors.torch import load_file

from peft_dlqat import TeacherCache, export_model
from peft_dlqat.files import save_tensors, unfinished

MODES = {0o022: 0o644, 0o002: 0o664, 0o077: 0o600}


@pytest.fixture(params=MODES, ids=oct)
def mode(request):
    """What a new file may be, by a umask that is set."""
    before = os.umask(request.param)
    yield MODES[request.param]
    os.umask(before)


def modes(folder):
    return {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_all_that_is_written_may_be_read_as_the_umask_says(tmp_path, mode):
    """Also where a file of another mode was there before; safetensors itself makes all of them 0600."""
    model = adapted(bits=4)
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
        TeacherCache(folder=tmp_path / "cache").teacher(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
        export_model(model, tmp_path / "out", "dense", verify=False, overwrite=True)
        found = modes(tmp_path)
        assert {"adapter_model.safetensors", "model.safetensors", "reference.safetensors"} <= found.keys()
        assert set(found.values()) == {mode}, found
        for path in tmp_path.rglob("*.safetensors"):
            path.chmod(0o600)
        (tmp_path / "cache" / "teacher.json").unlink()
        for path in (tmp_path / "cache").rglob("*.safetensors"):
            path.unlink()


def test_what_is_written_is_read(tmp_path):
    save_tensors({"a": torch.arange(3)}, tmp_path / "file", {"by": "me"})
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_export_leaves_is_removed_by_the_next(tmp_path):
    left = tmp_path / ".out.unfinished" / "new"
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    export_model(adapted(bits=4), tmp_path / "out", "dense", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    with (
        FileLock(tmp_path / ".out.unfinished.lock"),
        pytest.raises(RuntimeError, match=r"another process.*out'; wait"),
    ):
        export_model(adapted(bits=4), tmp_path / "out", "dense", verify=False)
    assert not (tmp_path / "out").exists()


def test_the_folder_stays_after_the_block_and_goes_after_an_exception(tmp_path):
    (tmp_path / "cache").mkdir()
    with unfinished(tmp_path / "out", tmp_path / "cache") as (made, cache):
        assert made.is_dir() and cache.is_dir() and cache.parent == tmp_path / "cache"
    assert made.is_dir() and not cache.exists()
    with pytest.raises(KeyError), unfinished(tmp_path / "out") as (made, cache):
        assert cache is None
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
