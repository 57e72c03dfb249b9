"""Calibration by blocks: what it gains, what it leaves alone, and the same from disk."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HIDDEN, VOCAB, lm_batches, random_model, tiny_model
from filelock import FileLock
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, OpenAIGPTConfig

import peft_dlqat.decoder
import peft_dlqat.large.calibrate_from_disk
import peft_dlqat.large.checkpoint
import peft_dlqat.train.blocks
from peft_dlqat import DLQATConfig, distillation_loss, teacher_logits
from peft_dlqat.decoder import NoDecoderLayers
from peft_dlqat.large.calibrate_from_disk import calibrate_blocks_from_disk
from peft_dlqat.layer import adapter_layers
from peft_dlqat.train.blocks import calibrate_blocks

KINDS = ("llama", "gpt2", "opt")
GRID = {"dlqat_scale", "dlqat_zero_point", "dlqat_offset"}
ADAPTER = {"dlqat_A", "dlqat_B", "dlqat_magnitude"}


def config(**changes):
    return DLQATConfig(**{"bits": 2, "group_size": 32, "task_type": "CAUSAL_LM", **changes})


def adapted(kind="llama", **changes):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(kind), config(**changes))


def run(model, steps=20, **arguments):
    return calibrate_blocks(model, lm_batches(), steps=steps, progress=False, **arguments)


@torch.no_grad()
def heldout_kl(model):
    batch = lm_batches(20, batch=8)[-1]
    model.eval()
    return distillation_loss(model(**batch).logits, teacher_logits(model, batch)).item()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model, before):
    return {
        name.split(".")[-2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_each_layers_error_and_the_models_divergence_fall(kind, zero_point):
    # The random model's "mse" grid leaves so little to gain that a few hundred tokens are not enough to show it.
    model = adapted(kind, zero_point=zero_point, init="minmax")
    before, divergence = state(model), heldout_kl(model)
    errors = run(model, steps=40)
    assert len(errors) == 2 and all(error.after < 0.97 * error.before for error in errors)
    assert all(isinstance(model.get_submodule(error.name), nn.Module) for error in errors)
    assert heldout_kl(model) < divergence
    assert moved(model, before) <= GRID and "dlqat_scale" in moved(model, before)


SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "base",
    [
        BloomConfig(**SIZES),
        FalconConfig(**SIZES),
        OpenAIGPTConfig(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=["bloom", "falcon", "openai-gpt"],
)
def test_layers_that_return_a_tuple_or_a_list(base):
    model = get_peft_model(random_model(base), config(init="minmax"))
    divergence = heldout_kl(model)
    errors = run(model, steps=40)
    assert len(errors) == 2 and all(error.after < 0.97 * error.before for error in errors)
    assert heldout_kl(model) < divergence


def test_the_first_error_is_the_layers_on_its_initial_grid():
    """Against the layers run by hand; the second layer's input comes from the calibrated first."""
    model = adapted()
    batches = lm_batches()

    @torch.no_grad()
    def error(index):
        outputs = []
        hook = model.get_submodule(f"base_model.model.model.layers.{index}").register_forward_hook(
            lambda *args: outputs.append(args[-1])
        )
        for batch in batches:
            model(**batch)
            with model.disable_adapter():
                model(**batch)
        hook.remove()
        return torch.stack([(a - b).square().mean() for a, b in zip(outputs[::2], outputs[1::2], strict=True)]).mean()

    model.eval()
    first = error(0).item()
    errors = run(model)
    assert errors[0].before == pytest.approx(first, rel=1e-4)
    assert errors[0].after == pytest.approx(error(0).item(), rel=1e-4)
    assert errors[1].after == pytest.approx(error(1).item(), rel=1e-4)


@pytest.mark.product(every=2)
@pytest.mark.parametrize("zero_point, also", [("integer", set()), ("float", {"dlqat_shift"})])
def test_the_adapter_is_fitted_on_request_and_gains_more(zero_point, also):
    alone, both = adapted(zero_point=zero_point), adapted(zero_point=zero_point)
    before = state(both)
    without, with_adapter = run(alone, steps=40), run(both, steps=40, train_adapter=True)
    assert all(a.after > b.after for a, b in zip(without, with_adapter, strict=True))
    assert (ADAPTER | also).issubset(moved(both, before))


def test_the_adapter_is_fitted_alike_whatever_the_size_of_the_weights():
    """v_proj / 32 and o_proj * 32 are the same function."""
    ends = []
    for factor in (1.0, 32.0):
        base = tiny_model()
        for layer in base.model.layers:
            layer.self_attn.v_proj.weight.data /= factor
            layer.self_attn.o_proj.weight.data *= factor
        torch.manual_seed(0)
        model = get_peft_model(base, config(bits=2, target_modules=["v_proj", "o_proj"]))
        ends.append([error.after for error in run(model, steps=30, train_adapter=True)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_weights_are_packed_as_by_calibrate_but_not_under_an_adapter_that_was_fitted():
    model = adapted(storage="int8")
    run(model, steps=2)
    assert all(layer.packed for layer in adapter_layers(model)[1].values())
    with pytest.raises(ValueError, match=r"train_adapter=True with storage='int8'.*leave one of the two out"):
        run(adapted(storage="int8"), train_adapter=True)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_the_frozen_grid_is_one_that_ships(zero_point):
    model = adapted(zero_point=zero_point)
    run(model, steps=5)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if ".dlqat_scale." in name:
            assert torch.equal(tensor, tensor.bfloat16().float())
        if ".dlqat_zero_point." in name:
            assert torch.equal(tensor, tensor.round())


def test_a_layer_whose_error_does_not_fall_keeps_its_initial_grid():
    model = adapted(init="minmax")  # which does not look at the inputs
    before = state(model)
    errors = run(model, steps=2, lr=10.0, train_adapter=True)
    assert all(error.after == error.before for error in errors)
    assert moved(model, before) == set()


def test_without_steps_the_grid_is_fitted_to_the_inputs():
    model = adapted()
    before = state(model)
    errors = run(model, steps=0)
    assert all(error.after <= error.before for error in errors) and errors[0].after < errors[0].before
    assert moved(model, before) <= GRID


def test_random_numbers_modes_and_flags_are_left_alone():
    model = adapted()
    model.train()
    model.base_model.model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    run(model, steps=3, train_adapter=True)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(buffer.requires_grad or buffer.grad is not None for buffer in model.buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.base_model.model.model.layers)


@pytest.mark.parametrize("train_adapter", [False, True])
def test_an_exception_puts_every_layer_back(train_adapter, monkeypatch, tmp_path):
    """At a step of the second layer, when the first one is calibrated already."""
    model = adapted()
    model.train()
    before, steps = state(model), itertools.count()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def check(value, *_):
        if next(steps) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(peft_dlqat.train.blocks, "check_finite", check)
    with pytest.raises(KeyboardInterrupt):
        run(model, steps=10, train_adapter=train_adapter, cache_dir=tmp_path)
    assert moved(model, before) == set() and model.training
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_finite_is_refused_and_the_grid_put_back():
    model = adapted()
    before = state(model)
    embedding = model.get_input_embeddings().weight.data
    embedding[5] = torch.nan
    batches = [{"input_ids": torch.full((2, 8), 5)}]
    with pytest.raises(FloatingPointError, match="put back"):
        calibrate_blocks(model, batches, steps=2, progress=False)
    embedding.copy_(before["base_model.model.model.embed_tokens.weight"])
    assert moved(model, before) == set()


def test_hidden_states_on_disk_give_the_same_and_leave_nothing(tmp_path):
    in_memory, on_disk = adapted(), adapted()
    assert run(in_memory, steps=5) == run(on_disk, steps=5, cache_dir=tmp_path)
    expected = in_memory.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in on_disk.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.product
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind, side):
    """Rows padded with two different tokens give the same grid."""
    grids = []
    for filler in (3, 4):
        batches = lm_batches(2, length=8)
        place = slice(0, 3) if side == "left" else slice(5, 8)
        for batch in batches:
            batch["input_ids"][:, place], batch["attention_mask"][:, place] = filler, 0
        model = adapted(kind)
        errors = calibrate_blocks(model, batches, steps=4, progress=False)
        assert all(np.isfinite(error.after) for error in errors)
        grids.append(model.state_dict())
    assert all(torch.allclose(tensor, grids[1][name], rtol=1e-5) for name, tensor in grids[0].items())


def test_bfloat16_and_adapters_injected_by_transformers():
    model = tiny_model(dtype=torch.bfloat16)
    model.add_adapter(config())
    errors = run(model, steps=20)
    assert [error.name for error in errors] == ["model.layers.0", "model.layers.1"]
    assert all(error.after < error.before for error in errors)


def test_only_layers_with_the_adapter_are_calibrated():
    model = adapted(layers_to_transform=[1])
    errors = run(model, steps=5)
    assert [error.name for error in errors] == ["base_model.model.model.layers.1"]


def test_the_model_card_tells(tmp_path):
    model = adapted()
    run(model, steps=5)
    model.save_pretrained(tmp_path)
    assert "5 steps by blocks, output" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_calls_are_kept_on_the_cpu_each_tensor_once():
    """A mask and position embeddings are the same tensors for all layers, and many batches of them take room."""

    class Elsewhere(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

    mask, angle = torch.ones(2, 4).as_subclass(Elsewhere), torch.ones(3).as_subclass(Elsewhere)
    calls = [((mask,), {"position_embeddings": (angle, angle), "use_cache": False}) for _ in range(3)]
    found = peft_dlqat.decoder._on_cpu(calls)
    tensors = [x for args, kwargs in found for x in (*args, *kwargs["position_embeddings"])]
    assert all(type(tensor) is torch.Tensor for tensor in tensors) and len(set(map(id, tensors))) == 2
    assert all(kwargs["use_cache"] is False and isinstance(args, tuple) for args, kwargs in found)


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Residual(nn.Module):
    """A list of layers, but something happens between them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("kind", [Perceptron, Residual])
def test_a_model_without_decoder_layers_is_refused(kind):
    model = get_peft_model(kind(), DLQATConfig(bits=2, group_size=32, target_modules=["first", "0", "1"]))
    before = state(model)
    with pytest.raises(NoDecoderLayers, match=r"use calibrate\(\)"):
        calibrate_blocks(model, [{"x": torch.randn(4, 32)}], steps=2, progress=False)
    assert issubclass(NoDecoderLayers, ValueError) and moved(model, before) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps=-1 must be"),
        ({"steps": True}, "steps=True must be"),
        ({"lr": -1.0}, "lr=-1.0 must be"),
        ({"batches": []}, "no calibration batches"),
        ({"batches": [{"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.zeros(2, 4)}]}, "masks are 0"),
        ({"batches": [torch.zeros(2, 2)]}, "batch is a Tensor"),
        ({"adapter_name": "other"}, "no DL-QAT adapter 'other'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate_blocks(adapted(), **{"batches": lm_batches(1), "steps": 2, "progress": False, **arguments})


def test_a_merged_or_inactive_adapter_is_refused():
    model = adapted()
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match="must be the active one"):
        run(model, adapter_name="other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        run(model)


# ----- From disk --------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    return tmp_path / "base"


def from_disk(folder, output, steps=4, adapter=None, batches=None, **arguments):
    return calibrate_blocks_from_disk(
        folder, adapter or config(), batches or lm_batches(), output, steps=steps, progress=False, **arguments
    )


@pytest.mark.product(every=5)
@pytest.mark.parametrize("train_adapter", [False, True])
def test_from_disk_equals_in_memory_to_the_bit(folder, tmp_path, train_adapter):
    """All of the adapter, the random A too, which follows the seed; and the random numbers drawn after it."""
    torch.manual_seed(3)
    errors = from_disk(folder, tmp_path / "out", train_adapter=train_adapter, cache_dir=tmp_path)
    drawn = torch.rand(1)

    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config())
    assert errors == run(model, steps=4, train_adapter=train_adapter)
    assert torch.equal(drawn, torch.rand(1))

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.peft_config["default"].record == model.peft_config["default"].record
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
    for name in ("in_memory", "out"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["record"]["storage"] == "int8"


def test_from_disk_in_another_dtype(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")  # one file
    torch.manual_seed(3)
    errors = from_disk(tmp_path / "base", tmp_path / "out", dtype=torch.bfloat16)
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert errors == run(get_peft_model(base, config()), steps=4)


def test_from_disk_writes_a_whole_folder_with_the_base_models_name(folder, tmp_path):
    given = config()
    from_disk(folder, tmp_path / "deep" / "out", adapter=given)
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    saved = json.loads((tmp_path / "deep" / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(folder) and saved["record"]["calibration"]["by"] == "blocks"
    assert given.record == {} and given.base_model_name_or_path is None
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
    streaming = peft_dlqat.large.calibrate_from_disk
    save = streaming._save
    monkeypatch.setattr(streaming, "_save", lambda *a: (save(*a), (tmp_path / "out" / "other").mkdir(parents=True)))
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


def killed_at(monkeypatch, layer, count):
    """Have calibration die at a decoder layer; counts the layers that it calibrates."""
    streaming = peft_dlqat.large.calibrate_from_disk
    calibrate_block = streaming.calibrate_block

    def calibrate(name, *args):
        if len(count) == layer:
            raise KeyboardInterrupt
        count.append(name)
        return calibrate_block(name, *args)

    monkeypatch.setattr(streaming, "calibrate_block", calibrate)


@pytest.mark.product(every=5)
@pytest.mark.parametrize("changes", [{}, {"storage": "int8"}, {"zero_point": "float"}])
@pytest.mark.parametrize("truncated", [False, True])
def test_a_killed_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, changes, truncated):
    """To the bit what a run gives that nobody killed; a layer whose file is cut short is calibrated again."""
    arguments = {"adapter": config(**changes), "train_adapter": not changes.get("storage")}
    torch.manual_seed(3)
    expected = from_disk(folder, tmp_path / "whole", **arguments)
    count = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_at(patch, 1, count)
        torch.manual_seed(3)
        from_disk(folder, tmp_path / "out", **arguments)
    part = tmp_path / ".out.unfinished" / "0.safetensors"
    assert part.exists() and not (tmp_path / "out").exists() and len(count) == 1
    if truncated:
        part.write_bytes(part.read_bytes()[:-1])
    again = []
    with monkeypatch.context() as patch:
        killed_at(patch, None, again)
        torch.manual_seed(3)
        assert from_disk(folder, tmp_path / "out", **arguments) == expected
    assert len(again) == len(expected) - (not truncated)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "whole"]


def masked(batches):
    for batch in batches:
        mask = torch.ones_like(batch["input_ids"])
        mask[:, :4] = 0
        yield {**batch, "attention_mask": mask}


def change_weights(folder, name):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.product(every=3)
@pytest.mark.parametrize(
    "change",
    [
        "steps",
        "bits",
        "dtype",
        "rows",
        "mask",
        "mlp.up_proj.weight",
        "input_layernorm.weight",
    ],
)
def test_an_unfinished_run_is_not_mixed_with_another(tmp_path, monkeypatch, change):
    tiny_model().save_pretrained(tmp_path / "base")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_at(patch, 1, [])
        from_disk(tmp_path / "base", tmp_path / "out")
    part = tmp_path / ".out.unfinished" / "0.safetensors"
    before = part.read_bytes()
    arguments = {"steps": {"steps": 5}, "bits": {"adapter": config(bits=4)}, "dtype": {"dtype": torch.bfloat16}}
    batches = {"rows": lm_batches()[:1], "mask": [*masked(lm_batches())]}
    if change.endswith(".weight"):
        change_weights(tmp_path / "base", f"model.layers.0.{change}")
    with pytest.raises(ValueError, match=r"unfinished calibration with other arguments.*remove the folder"):
        from_disk(tmp_path / "base", tmp_path / "out", batches=batches.get(change), **arguments.get(change, {}))
    assert part.read_bytes() == before and not (tmp_path / "out").exists()


def test_one_process_at_a_time_works_for_a_folder(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "base")
    (tmp_path / ".out.unfinished").mkdir()
    with FileLock(tmp_path / ".out.unfinished" / "lock"), pytest.raises(RuntimeError, match="another process"):
        from_disk(tmp_path / "base", tmp_path / "out")
    from_disk(tmp_path / "base", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("where", ["_save", "_put_in_place"])
def test_a_run_that_fails_at_the_very_end_loses_nothing(tmp_path, monkeypatch, where):
    """The adapter half written, or nowhere to put it."""
    tiny_model().save_pretrained(tmp_path / "base")
    streaming = peft_dlqat.large.calibrate_from_disk
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, OSError)):
        if where == "_save":

            def save(model, state, folder):
                folder.mkdir()
                (folder / "README.md").write_text("half")
                raise KeyboardInterrupt

            patch.setattr(streaming, "_save", save)
        else:

            def no_room(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(streaming.os, "rename", no_room)
            patch.setattr(streaming.shutil, "move", no_room)
        from_disk(tmp_path / "base", tmp_path / "out")
    count = []
    killed_at(monkeypatch, None, count)
    from_disk(tmp_path / "base", tmp_path / "out")
    assert not count and "half" not in (tmp_path / "out" / "README.md").read_text()


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


def test_one_layers_weights_and_adapters_are_in_memory_at_a_time(folder, tmp_path, monkeypatch):
    held, models = [], []
    streaming = peft_dlqat.large.calibrate_from_disk
    get_peft_model, calibrate_block = streaming.get_peft_model, streaming.calibrate_block

    def look(name, *args):
        tensors = {n: t for n, t in models[0].state_dict().items() if ".layers." in n or ".h." in n}
        held.append((name, {n for n, t in tensors.items() if not t.is_meta}))
        return calibrate_block(name, *args)

    def make(*args, **kwargs):
        models.append(get_peft_model(*args, **kwargs))
        return models[0]

    monkeypatch.setattr(streaming, "get_peft_model", make)
    monkeypatch.setattr(streaming, "calibrate_block", look)
    from_disk(folder, tmp_path / "out")
    assert len(held) == 2
    for name, tensors in held:
        assert any(".dlqat_A." in n for n in tensors) and all(n.startswith(f"{name}.") for n in tensors), name


@pytest.mark.parametrize("initialised", [False, True])
def test_several_processes_are_refused(tmp_path, monkeypatch, initialised):
    """Started by torchrun, whether or not a process group was made."""
    if initialised:
        monkeypatch.setattr(peft_dlqat.large.calibrate_from_disk, "several_processes", lambda: True)
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
