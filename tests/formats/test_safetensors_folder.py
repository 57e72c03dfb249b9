"""A folder of safetensors files: what is damaged is refused, and of what is replaced nothing is copied."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dlqat.formats import FORMATS
from peft_dlqat.formats.safetensors_folder import FolderOrigin, SafetensorsFolder
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.quantizer import QuantizedWeight

GRID = Grid(4, 32, "none", torch.float16)


def some_weight(seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (32, 64), dtype=torch.int8, generator=generator)
    return QuantizedWeight(codes, torch.rand(32, 2, generator=generator).half().float(), None, GRID)


@pytest.fixture
def path(tmp_path):
    layout = FORMATS["gptq"].layout({"quant_method": "gptq"})
    tensors = {
        f"{name}.{part}": value for name in "ab" for part, value in layout.tensors(some_weight(ord(name))).items()
    }
    made = tmp_path / "model"
    made.mkdir()
    save_file(tensors | {"norm.weight": torch.ones(64, dtype=torch.bfloat16)}, made / "model.safetensors")
    (made / "config.json").write_text("{}")
    return made


def origin_of(path):
    folder = SafetensorsFolder.open(path)
    layout = FORMATS["gptq"].layout({"quant_method": "gptq"})
    names = {"a.weight": "a", "b.weight": "b"}
    return FolderOrigin(path, folder.sha256(), names, format="gptq", folder=folder, layout=layout)


def test_it_is_read_as_safetensors_reads_it(path):
    folder, expected = SafetensorsFolder.open(path), load_file(path / "model.safetensors")
    assert folder.tensors.keys() == expected.keys()
    assert all(torch.equal(folder.read(name), value) for name, value in expected.items())
    assert folder.size == (path / "model.safetensors").stat().st_size


def test_what_is_replaced_is_not_copied(path, tmp_path):
    origin, new = origin_of(path), tmp_path / "new"
    new.mkdir()
    with origin.written_to(new, ["a.weight"]) as put:
        before = load_file(new / "model.safetensors")
        assert not any(value.any() for name, value in before.items() if name.startswith("a."))
        assert all(value.any() for name, value in before.items() if not name.startswith("a."))
        put("a.weight", some_weight(ord("a")))
    assert (new / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_other_weights_are_not_copied(path, tmp_path):
    origin, new = origin_of(path), tmp_path / "new"
    new.mkdir()
    (path / "original").mkdir()
    for name in ("pytorch_model.bin", "original/model.safetensors", "model.gguf", "tokenizer.model", "original/a.txt"):
        (path / name).write_bytes(b"x")
    with origin.written_to(new, []):
        pass
    found = {str(file.relative_to(new)) for file in new.rglob("*") if file.is_file()}
    assert found == {"config.json", "model.safetensors", "tokenizer.model", "original/a.txt"}


def test_a_weight_that_does_not_fit_its_place_is_refused(path, tmp_path):
    wide = Grid(4, 32, "none", torch.float32)
    weight = QuantizedWeight(torch.zeros(32, 64, dtype=torch.int8), torch.ones(32, 2), None, wide)
    message = r"a.weight has scales .*float32, and its place in the file .*float16"
    with pytest.raises(ValueError, match=message), origin_of(path).written_to(tmp_path, ["a.weight"]) as put:
        put("a.weight", weight)


def test_a_folder_that_has_changed_is_not_written(path, tmp_path):
    origin = origin_of(path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="has changed since it was opened"), origin.written_to(tmp_path, []):
        pass


def test_tensors_have_the_numbers_of_the_file(path):
    origin = origin_of(path)
    assert origin.exact("norm.weight", torch.zeros(64)).dtype == torch.bfloat16
    assert torch.equal(origin.exact("a.weight", torch.zeros(2)), torch.zeros(2))
    assert torch.equal(origin.exact("rope", torch.zeros(2)), torch.zeros(2))


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def index(**weight_map):
    return lambda path: (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def twice(path):
    save_file({"norm.weight": torch.ones(1)}, path / "more.safetensors")
    index(**{"norm.weight": "model.safetensors", "x": "more.safetensors"})(path)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (cut, ValueError, "damaged or cut short"),
        (lambda path: (path / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
        (lambda path: (path / "config.json").unlink(), FileNotFoundError, "there is no .*config.json"),
        (lambda path: (path / "config.json").write_text("[]"), ValueError, r"config.json holds \[\], no object"),
        (lambda path: (path / "config.json").write_text("{"), ValueError, "config.json is no JSON"),
        (index(a="../model.safetensors"), ValueError, "is no name of a file beside it"),
        (index(a=3), ValueError, "is no name of a file beside it"),
        (index(), ValueError, "no file is no name"),
        (index(c="model.safetensors"), ValueError, "has no 'c' in model.safetensors, as model.safetensors.index.json"),
        (index(a="other.safetensors"), FileNotFoundError, "has no other.safetensors"),
        (twice, ValueError, "has norm.weight in model.safetensors and in more.safetensors"),
    ],
)
def test_what_is_not_whole_is_refused(path, spoil, error, message):
    spoil(path)
    with pytest.raises(error, match=message):
        SafetensorsFolder.open(path)
