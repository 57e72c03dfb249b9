"""Calibration of a model whose decoder layers are read from disk one at a time: as in memory, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import lm_batches, tiny_model
from filelock import FileLock
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_dlqat.large.calibrate_from_disk as from_disk_module
import peft_dlqat.large.checkpoint
from peft_dlqat import DLQATConfig, calibrate, calibrate_from_disk
from peft_dlqat.quant.fixed_point import STORAGES

each_kind = pytest.mark.parametrize("folder", ("llama", "gpt2", "opt"), indirect=True)


def config(**changes):
    return DLQATConfig(**{"bits": 2, "group_size": 32, "init": "minmax", "task_type": "CAUSAL_LM", **changes})


def run(model, steps, **arguments):
    """The same in memory."""
    return calibrate(model, lm_batches(), steps, by="blocks", objective="output", progress=False, **arguments)


@pytest.fixture
def folder(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    return tmp_path / "base"


def from_disk(folder, output, steps=4, adapter=None, batches=None, **arguments):
    return calibrate_from_disk(
        folder, adapter or config(), batches or lm_batches(), output, steps=steps, progress=False, **arguments
    )


@pytest.mark.product
@each_kind
@pytest.mark.parametrize("train_adapter", [False, True])
def test_from_disk_equals_in_memory_to_the_bit(folder, tmp_path, train_adapter):
    """All of the adapter, the random A too, which follows the seed; and the random numbers drawn after it."""
    torch.manual_seed(3)
    fitted = config(init="mse")  # to the layers' inputs, too
    errors = from_disk(folder, tmp_path / "out", adapter=fitted, train_adapter=train_adapter, cache_dir=tmp_path)
    drawn = torch.rand(1)

    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), fitted)
    assert errors == run(model, steps=4, train_adapter=train_adapter)
    assert torch.equal(drawn, torch.rand(1))

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_from_disk_for_packed_weights_says_so_as_in_memory(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    in_memory = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(storage="int8"))
    run(in_memory, steps=2)
    in_memory.save_pretrained(tmp_path / "in_memory")
    torch.manual_seed(0)
    from_disk(tmp_path / "base", tmp_path / "out", steps=2, adapter=config(storage="int8"))
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("in_memory", "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {int(value[6]) for key, value in found.items() if "dlqat_spec" in key} == {STORAGES["int8"].number}


def test_from_disk_in_another_dtype(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")  # one file
    torch.manual_seed(3)
    fitted = config(init="mse")
    errors = from_disk(tmp_path / "base", tmp_path / "out", adapter=fitted, dtype=torch.bfloat16)
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert errors == run(get_peft_model(base, fitted), steps=4)


def test_decoder_layers_without_the_adapter_are_passed(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    result = from_disk(tmp_path / "base", tmp_path / "out", adapter=config(layers_to_transform=[1]))
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert result == run(get_peft_model(base, config(layers_to_transform=[1])), steps=4) and len(result.blocks) == 1


@pytest.mark.product(every=3)
@each_kind
def test_from_disk_writes_a_whole_folder_with_the_base_models_name(folder, tmp_path):
    given = config()
    from_disk(folder, tmp_path / "deep" / "out", adapter=given)
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    saved = json.loads((tmp_path / "deep" / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(folder)
    assert given.base_model_name_or_path is None
    tensors = load_file(tmp_path / "deep" / "out" / "adapter_model.safetensors")
    assert all(".dlqat_" in name for name in tensors)


def test_an_output_folder_that_exists_is_refused_and_stays(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="name a new folder"):
        from_disk(tmp_path / "base", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_an_adapter_whose_folder_was_taken_meanwhile_is_kept_beside_it(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "base")
    save = PeftModel.save_pretrained

    def save_and_take(*args, **kwargs):
        save(*args, **kwargs)
        (tmp_path / "out" / "other").mkdir(parents=True)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_and_take)
    with pytest.raises(OSError, match=r"cannot be written any more.*the adapter is in") as caught:
        from_disk(tmp_path / "base", tmp_path / "out")
    kept = Path(str(caught.value).split("is in '")[1].split("'")[0])
    assert (kept / "adapter_model.safetensors").exists() and [*(tmp_path / "out").iterdir()]


def test_nothing_is_written_after_a_failure(tmp_path):
    model = tiny_model()
    model.model.layers[1].input_layernorm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(FloatingPointError):
        from_disk(tmp_path / "base", tmp_path / "out", cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("cache", [None, "cache"])
def test_what_a_killed_run_leaves_is_found_by_name_and_removed_by_the_next(tmp_path, monkeypatch, cache):
    tiny_model().save_pretrained(tmp_path / "base")
    (tmp_path / "cache").mkdir()
    for folder in {tmp_path, tmp_path / (cache or ".")}:
        (folder / ".out.unfinished" / "hidden").mkdir(parents=True)
        (folder / ".out.unfinished" / "hidden" / "old.pt").touch()
    files, calibrate_block = [], from_disk_module.calibrate_block

    def look(*args):
        found = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".out.unfinished.lock")
        files.extend(path for path in found if tmp_path / "base" not in path.parents)
        return calibrate_block(*args)

    monkeypatch.setattr(from_disk_module, "calibrate_block", look)
    from_disk(tmp_path / "base", tmp_path / "out", cache_dir=cache and tmp_path / cache)
    assert bool(files) == (cache is not None) and not any(path.name == "old.pt" for path in files)
    assert all(tmp_path / "cache" / ".out.unfinished" in path.parents for path in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "cache", "out"]
    assert [*(tmp_path / "cache").iterdir()] == []


def test_one_process_at_a_time_works_for_an_output(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    with FileLock(tmp_path / ".out.unfinished.lock"), pytest.raises(RuntimeError, match="another process"):
        from_disk(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_cache_beside_the_output_leaves_nothing_in_it(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    from_disk(tmp_path / "base", tmp_path / "out", cache_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(PeftModel, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_disk(tmp_path / "base", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_missing_and_quantized_tensors_are_named(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 2 .*model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"):
        from_disk(tmp_path / "base", tmp_path / "out")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        from_disk(tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head lie outside"),
    ],
)
def test_configs_that_need_the_whole_model_are_refused(tmp_path, changes, message):
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        from_disk(tmp_path / "base", tmp_path / "out", adapter=config(**changes))


def test_a_checkpoint_of_the_bare_model_is_found_by_its_prefix(tmp_path):
    """GPT-2's own checkpoint has no "transformer." before its names, and no tied head."""
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    expected = from_disk(tmp_path / "base", tmp_path / "first")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert "wte.weight" in bare and "lm_head.weight" not in bare
    save_file(bare, file, metadata={"format": "pt"})
    assert from_disk(tmp_path / "base", tmp_path / "second") == expected


@pytest.mark.product(every=3)
@each_kind
def test_one_layers_weights_are_in_memory_at_a_time(folder, tmp_path, monkeypatch):
    held, models = [], []
    get_peft_model, calibrate_block = from_disk_module.get_peft_model, from_disk_module.calibrate_block

    def look(name, *args):
        tensors = {n: t for n, t in models[0].state_dict().items() if "dlqat" not in n and t.is_floating_point()}
        held.append((name, {n for n, t in tensors.items() if not t.is_meta}))
        return calibrate_block(name, *args)

    def make(*args, **kwargs):
        models.append(get_peft_model(*args, **kwargs))
        return models[0]

    monkeypatch.setattr(from_disk_module, "get_peft_model", make)
    monkeypatch.setattr(from_disk_module, "calibrate_block", look)
    from_disk(folder, tmp_path / "out")
    assert len(held) == 2
    for name, tensors in held:
        assert any(n.endswith(".base_layer.weight") for n in tensors), name
        assert all(n.startswith(f"{name}.") for n in tensors), name


@pytest.mark.parametrize("initialised", [False, True])
def test_several_processes_are_refused(tmp_path, monkeypatch, initialised):
    """Started by torchrun, whether or not a process group was made."""
    if initialised:
        monkeypatch.setattr(from_disk_module, "several_processes", lambda: True)
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(RuntimeError, match=r"works in one process.*python instead of torchrun"):
        from_disk(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_looked_up_and_named_as_the_base(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "snapshot")
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(peft_dlqat.large.checkpoint, "snapshot_download", snapshot_download)
    from_disk("somebody/model", tmp_path / "out", adapter=config(revision="v1"))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert asked == [("somebody/model", "v1")] and saved["base_model_name_or_path"] == "somebody/model"
