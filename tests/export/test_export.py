"""Exported models are the trained ones: each engine that is installed finds the merged model's logits."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import perturb
from export_models import (
    ENGINE_MODULES,
    adapted,
    assert_same,
    base_model,
    exported_logits,
    merged_logits,
    needs,
    save_base,
)
from peft import PeftModel
from safetensors import safe_open

from peft_dlqat import export_model, pack_weights, verify_export
from peft_dlqat.export.manifest import load_manifest, load_reference
from peft_dlqat.layer import adapter_layers

FORMATS = tuple(ENGINE_MODULES)


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("compressed-tensors", {"zero_point": "float"}),
        ("compressed-tensors", {"bits": 5}),
        ("gguf", {"group_size": 16}),
        ("gguf", {"zero_point": "integer", "bits": 8}),
        ("mlx", {"group_size": 16}),
    ],
)
def test_a_grid_that_the_format_does_not_hold_is_refused(format, settings, tmp_path):
    needs(format)
    with pytest.raises(ValueError, match=r"cannot hold .* exactly; use .* Every weight is held by .*'dense'\."):
        export_model(adapted(**{"bits": 4, **settings}), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verify", [True, False])
def test_a_loss_is_measured_without_an_engine(verify, tmp_path, capsys):
    """GPTQ's engine is not among those of the test environment."""
    export_model(adapted(bits=4), tmp_path / "out", "gptq", dtype="bfloat16", verify=verify)
    loss = load_manifest(tmp_path / "out").loss
    assert 1e-12 < loss["kl"] < 0.05 and f"KL {loss['kl']:.3g}" in capsys.readouterr().err
    assert f"KL {loss['kl']:.3g}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("format", "zero_point"), [("gguf", "none"), ("gguf", "float"), ("gptq", "integer")])
def test_a_scale_that_the_file_would_round_is_refused(format, zero_point, tmp_path):
    """The grid is one that the format holds, one of its numbers is not."""
    model = adapted(bits=4, zero_point=zero_point)
    next(iter(adapter_layers(model)[1].values())).dlqat_scale["default"][0, 0] = 1e-9
    with pytest.raises(ValueError, match=r"q_proj.weight: a scale or offset of .* has no exact float16.*'float16'"):
        export_model(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_embeddings_have_no_type_of_their_own_but_in_gguf(tmp_path):
    with pytest.raises(ValueError, match=r"embeddings='q8_0' has no meaning in format='dense'.*dtype=\.\.\."):
        export_model(adapted(bits=4), tmp_path / "out", "dense", embeddings="q8_0")


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_trained_on_packed_weights(format, tmp_path):
    """From the live model, and from its folder on the base model, whose weights are whole."""
    needs(format)
    model = adapted(bits=3, storage="int8")
    with pytest.warns(UserWarning, match="trained on full weights"):
        pack_weights(model)
    settings = {"dtype": "float32"} if format == "dense" else {}
    assert_same(export_model(model, tmp_path / "live", format, **settings), format)
    base = save_base("llama", tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert_same(export_model(tmp_path / "adapter", tmp_path / "disk", format, base=base, **settings), format)
    _, live = load_reference(tmp_path / "live")
    _, disk = load_reference(tmp_path / "disk")
    assert torch.equal(live, disk)


@pytest.mark.parametrize("kind", ["tied", "mistral", "qwen2", "qwen3", "embedded"])
@pytest.mark.parametrize("format", FORMATS)
def test_architectures(kind, format, tmp_path):
    needs(format)
    model = adapted(kind, bits=3)
    settings = {"dtype": "float32"} if format == "dense" else {}
    assert_same(export_model(model, tmp_path / "out", format, **settings), format)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
@pytest.mark.parametrize("format", ["compressed-tensors", "gguf", "dense"])
def test_gemmas_with_windows(format, kind, tmp_path):
    """mlx-lm has no window for Gemma 2, and one pattern of layers for Gemma 3."""
    needs(format)
    settings = {"dtype": "float32"} if format == "dense" else {}
    assert_same(export_model(adapted(kind, bits=3), tmp_path / "out", format, **settings), format)


@pytest.mark.parametrize("format", ["compressed-tensors", "mlx", "gptq"])
def test_conv1d_has_no_place_but_in_gguf(format, tmp_path):
    model = adapted("gpt2", bits=4)
    with pytest.raises(ValueError, match=r"cannot pack Conv1D layers.*\. Every weight is held by 'gguf', 'dense'\."):
        export_model(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_on_disk_gives_the_same_files(format, tmp_path):
    """One tensor at a time from the base model's files, in several shards."""
    needs(format)
    base = save_base("llama", tmp_path / "base", max_shard_size="1MB")
    model = adapted(bits=3)
    model.base_model.model.name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    for source, out in ((model, "live"), (tmp_path / "adapter", "disk")):
        kwargs = {} if source is model else {"base": base}
        export_model(source, tmp_path / out, format, max_shard_size=2**20, verify=False, **kwargs)
    live, disk = (sorted(path.name for path in (tmp_path / out).glob("model*")) for out in ("live", "disk"))
    assert live == disk and live
    for name in live:
        assert (tmp_path / "live" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
    assert_same(verify_export(tmp_path / "disk"), format)


def test_the_full_model_is_never_in_memory(tmp_path, monkeypatch):
    """At no time are the base weights of two layers there."""
    import peft_dlqat.large.checkpoint

    base = save_base("llama", tmp_path / "base")
    adapted(bits=3).save_pretrained(tmp_path / "adapter")
    present, most = set(), []
    load, release = peft_dlqat.large.checkpoint.Checkpoint.load, peft_dlqat.large.checkpoint.Checkpoint.release

    def counted_load(self, model, names):
        present.update(names)
        most.append(len(present))
        return load(self, model, names)

    def counted_release(self, model, names):
        present.difference_update(names)
        return release(self, model, names)

    monkeypatch.setattr(peft_dlqat.large.checkpoint.Checkpoint, "load", counted_load)
    monkeypatch.setattr(peft_dlqat.large.checkpoint.Checkpoint, "release", counted_release)
    export_model(tmp_path / "adapter", tmp_path / "out", "dense", base=base, verify=False)
    assert most and max(most) == 1 and not present


@pytest.mark.parametrize("zero_point", ["none", "integer"])
@pytest.mark.parametrize("format", ["compressed-tensors", "gguf", "mlx"])
def test_grids_that_differ_by_layer(format, zero_point, tmp_path):
    needs(format)
    model = adapted(
        bits=3, zero_point=zero_point, bits_pattern={"q_proj": 4}, group_size_pattern={"down_proj": 128, "o_proj": -1}
    )
    assert_same(export_model(model, tmp_path / "out", format), format)


@pytest.mark.parametrize("format", FORMATS)
def test_untouched_linears_and_modules_to_save(format, tmp_path):
    needs(format)
    model = adapted(bits=3, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], bias="none")
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight += 0.01
    assert_same(export_model(model, tmp_path / "out", format), format)
    ids, reference = load_reference(tmp_path / "out")
    assert torch.equal(reference, merged_logits(model, ids))
    manifest = load_manifest(tmp_path / "out")
    assert manifest.modules_to_save == ["lm_head"] and "model.layers.0.self_attn.k_proj" in manifest.dense_linears


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf", "dense"])
def test_trained_biases_come_from_the_adapter(format, tmp_path):
    needs(format)
    base = save_base("qwen2", tmp_path / "base")
    model = adapted("qwen2", bits=4, bias="dlqat_only")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".base_layer.bias"):
                parameter += 0.1
    model.save_pretrained(tmp_path / "adapter")
    assert_same(export_model(tmp_path / "adapter", tmp_path / "out", format, base=base), format)
    ids, reference = load_reference(tmp_path / "out")
    assert torch.equal(reference, merged_logits(model, ids))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_an_adapted_head_is_untied(format, tmp_path):
    """Its weight is quantized, the embedding's is not: they are two tensors now."""
    needs(format)
    model = adapted("tied", bits=4, target_modules=["q_proj", "lm_head"])
    assert_same(export_model(model, tmp_path / "out", format), format)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    ids, _ = load_reference(tmp_path / "out")
    model.eval()
    with torch.no_grad():
        assert torch.equal(load_reference(tmp_path / "out")[1], model(input_ids=ids, use_cache=False).logits)


def test_a_merged_model_and_one_of_several_adapters(tmp_path):
    model = adapted(bits=3)
    expected = merged_logits(model, torch.arange(16)[None])
    model.merge_adapter()
    export_model(model, tmp_path / "merged", "dense", verify=False)
    assert torch.equal(exported_logits(tmp_path / "merged", torch.arange(16)[None]), expected)
    model.unmerge_adapter()
    model.add_adapter("other", model.peft_config["default"].__class__(bits=2, group_size=32, task_type="CAUSAL_LM"))
    export_model(model, tmp_path / "one", "dense", adapter_name="default", verify=False)
    assert torch.equal(exported_logits(tmp_path / "one", torch.arange(16)[None]), expected)


def test_a_bfloat16_model_is_compared_in_float32(tmp_path):
    needs("gguf")
    model = adapted(bits=3, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert_same(export_model(model, tmp_path / "out", "gguf"), "gguf")


@pytest.mark.parametrize("format", FORMATS)
def test_a_number_too_large_for_its_dtype_is_refused(format, tmp_path):
    needs(format)
    model = adapted(bits=4)
    model.get_input_embeddings().weight.data[3, 5] = -1e6
    with pytest.raises(ValueError, match=r"embed_tokens.weight: -1e\+06 is too large for (float16|F16).*'bfloat16'"):
        export_model(model, tmp_path / "out", format, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_shards_have_an_index(tmp_path):
    export_model(adapted(bits=3), tmp_path / "out", "dense", max_shard_size=2**20, verify=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    for name in files:
        with safe_open(tmp_path / "out" / name, framework="pt") as tensors:
            assert set(tensors.keys()) == {key for key, file in index["weight_map"].items() if file == name}


def test_an_injected_adapter_without_peft_model(tmp_path):
    """transformers' own add_adapter leaves a PreTrainedModel."""
    model = base_model()
    model.add_adapter(adapted(bits=3).peft_config["default"])
    perturb(model)
    with pytest.warns(UserWarning, match="never calibrated"):  # as the adapter whose config it has was
        export_model(model.eval(), tmp_path / "out", "dense", verify=False)
    assert not isinstance(model, PeftModel)
    ids, reference = load_reference(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, reference)
