"""Shards of safetensors files, and JSON."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from peft_dlqat.formats.tensor_files import TensorFiles, write_json


@pytest.mark.parametrize(
    "limit, shards",
    [(4, ["a", "b", "c", "d"]), (8, ["ab", "cd"]), (11, ["ab", "cd"]), (12, ["abc", "d"]), (16, ["abcd"])],
)
def test_a_shard_holds_what_fits(limit, shards, tmp_path):
    files = TensorFiles(tmp_path, limit)
    for number, name in enumerate("abcd"):
        files.add(name, torch.tensor([float(number)]))
    files.close()
    found = {path.name: "".join(sorted(load_file(path))) for path in sorted(tmp_path.glob("*.safetensors"))}
    assert list(found.values()) == shards
    if len(shards) == 1:
        assert list(found) == ["model.safetensors"] and len(list(tmp_path.iterdir())) == 1
        return
    assert next(iter(found)) == f"model-00001-of-0000{len(shards)}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 16}
    assert index["weight_map"] == {name: file for file, names in found.items() for name in names}


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path):
    files = TensorFiles(tmp_path, 4)
    files.add("a", torch.zeros(3, 2).t())
    files.close()
    assert load_file(tmp_path / "model.safetensors")["a"].shape == (2, 3)


def test_json_is_indented_and_ends_in_a_line(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
