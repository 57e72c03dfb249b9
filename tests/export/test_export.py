"""Exported models are the trained ones: each engine that is installed finds the merged model's logits."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import perturb
from export_models import adapted, base_model, merged_logits, save_base
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from peft_dlqat import Grid, export_model, pack_weights, verify_export
from peft_dlqat.export.manifest import load_manifest, load_reference
from peft_dlqat.formats import RULES
from peft_dlqat.layer import adapter_layers

FORMATS = ("compressed-tensors", "gguf", "mlx", "dense")
PACKAGES = {"compressed-tensors": "compressed_tensors", "gguf": "gguf", "mlx": "mlx_lm", "dense": "torch"}
# Largest KL divergence by which an engine's own arithmetic may differ; None where it is the reference's.
LARGEST_KL = {"mlx": 1e-10}


@pytest.fixture(autouse=True)
def _quiet_transformers():
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


def needs(format: str) -> None:
    pytest.importorskip(PACKAGES[format])


def grids(name: str, sizes: tuple[int, ...]) -> list[dict[str, object]]:
    """All grids with some group sizes that a format holds."""
    settings = [
        {"bits": bits, "group_size": size, "zero_point": zero_point}
        for bits, size, zero_point in itertools.product((2, 3, 4, 8), sizes, ("none", "integer", "float"))
    ]
    return [setting for setting in settings if RULES[name].holds(Grid(**setting, scale_dtype=torch.bfloat16))]


def as_id(setting: dict[str, object]) -> str:
    return "-".join(str(value) for value in setting.values())


def exported_logits(folder, ids, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_same(found, format: str) -> None:
    """What `verify_export` found is the trained model."""
    assert found.ok, str(found)
    (figures,) = (row for row in found.figures if row.engine in ("transformers", "mlx-lm"))
    if format in LARGEST_KL:
        assert figures.kl <= LARGEST_KL[format] and figures.top1 == 1.0
    else:
        assert figures.max_difference == 0.0 and figures.kl == 0.0


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", grids("compressed-tensors", (32, 128, -1)), ids=as_id)
def test_compressed_tensors_holds_the_merged_model(setting, tmp_path):
    needs("compressed-tensors")
    model = adapted(**setting)
    assert_same(export_model(model, tmp_path / "out", "compressed-tensors"), "compressed-tensors")
    ids, reference = load_reference(tmp_path / "out")
    assert torch.equal(reference, merged_logits(model, ids))
    assert torch.equal(exported_logits(tmp_path / "out", ids), reference)


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", grids("gguf", (32, 256, -1)), ids=as_id)
def test_gguf_holds_the_merged_model(setting, tmp_path):
    needs("gguf")
    model = adapted(**setting)
    assert_same(export_model(model, tmp_path / "out", "gguf"), "gguf")
    ids, _ = load_reference(tmp_path / "out")
    # By the file's own metadata, not by config.json.
    assert torch.equal(exported_logits(tmp_path / "out", ids, gguf_file="model.gguf"), merged_logits(model, ids))


K_QUANTS = {
    "Q2_K": {"bits": 2, "zero_point": "float", "group_size": 16},
    "Q3_K": {"bits": 3, "zero_point": "none", "group_size": 16},
    "Q4_K": {"bits": 4, "zero_point": "float", "group_size": 32},
    "Q6_K": {"bits": 6, "zero_point": "none", "group_size": 16},
}


@pytest.mark.parametrize("name", K_QUANTS)
def test_gguf_holds_what_was_trained_on_a_k_quant(name, tmp_path):
    needs("gguf")
    model = adapted(**K_QUANTS[name], scale_dtype="k_quant", export=["gguf"])
    assert_same(export_model(model, tmp_path / "out", "gguf"), "gguf")
    import gguf

    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert name in kinds
    ids, _ = load_reference(tmp_path / "out")
    assert torch.equal(exported_logits(tmp_path / "out", ids, gguf_file="model.gguf"), merged_logits(model, ids))


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


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", grids("mlx", (32, 256)), ids=as_id)
def test_mlx_holds_the_merged_model(setting, tmp_path):
    needs("mlx")
    assert_same(export_model(adapted(**setting), tmp_path / "out", "mlx"), "mlx")


@pytest.mark.parametrize("setting", grids("dense", (64,)), ids=as_id)
def test_dense_holds_the_merged_model_in_float32(setting, tmp_path):
    assert_same(export_model(adapted(**setting), tmp_path / "out", "dense"), "dense")


def test_dense_says_what_its_dtype_rounds(tmp_path, capsys):
    model = adapted(bits=3)
    found = export_model(model, tmp_path / "out", "dense", dtype="bfloat16")
    assert_same(found, "dense")  # as the model that was rounded so
    manifest = load_manifest(tmp_path / "out")
    assert not manifest.exact and len(manifest.rounded) > 14 and manifest.loss["kl"] > 0
    printed = capsys.readouterr().out
    assert "dense tensors rounded" in printed and f"rounded for the format: {found.loss}" in printed
    ids, trained = load_reference(tmp_path / "out")
    difference = (exported_logits(tmp_path / "out", ids) - trained).abs().max().item()
    assert 0 < found.loss.max_difference == difference < 0.1 and torch.equal(trained, merged_logits(model, ids))
    assert verify_export(tmp_path / "out") == found


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


@pytest.mark.parametrize("kind", ["gemma", "phi"])
def test_gguf_of_what_transformers_does_not_read(kind, tmp_path):
    """Its loader is no engine for these, and the export is kept."""
    needs("gguf")
    found = export_model(adapted(kind, bits=4), tmp_path / "out", "gguf")
    assert "transformers" not in [row.engine for row in found.figures]
    assert (tmp_path / "out" / "model.gguf").is_file()


_YARN = {
    "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("gemma2", "query_pre_attn_scalar", 256),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma3", "query_pre_attn_scalar", 256),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "layer_types", ["full_attention", "full_attention"]),
        ("gemma3", "rope_parameters", _YARN),
    ],
)
def test_a_gemma_that_llama_cpp_computes_otherwise_is_refused(kind, name, value, tmp_path):
    needs("gguf")
    model = adapted(kind, bits=4)
    setattr(model.get_base_model().config, name, value)
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be written as GGUF: .*; export the model as"):
        export_model(model, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


def test_gpt2_through_gguf(tmp_path):
    """Conv1D keeps its weight as [in, out]; the codes are [out, in], as GGUF has them."""
    needs("gguf")
    assert_same(export_model(adapted("gpt2", bits=4), tmp_path / "out", "gguf"), "gguf")


@pytest.mark.parametrize("format", ["compressed-tensors", "mlx", "gptq"])
def test_conv1d_has_no_place_but_in_gguf(format, tmp_path):
    model = adapted("gpt2", bits=4)
    with pytest.raises(ValueError, match=r"Conv1D layers, which .* cannot pack; export the model as 'gguf'"):
        export_model(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_gpt2_through_compressed_tensors_stays_dense(tmp_path):
    needs("compressed-tensors")
    found = export_model(adapted("gpt2", bits=4), tmp_path / "out", "compressed-tensors", lossy=True)
    assert found.figures[0].max_difference == 0.0  # in float32
    assert "8 weights are kept dense" in load_manifest(tmp_path / "out").lossy[0]


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


def test_q8_0_embeddings_say_their_loss(tmp_path, capsys):
    needs("gguf")
    found = export_model(adapted(bits=3), tmp_path / "out", "gguf", embeddings="q8_0")
    assert_same(found, "gguf")
    assert 0 < found.loss.kl < 1e-2
    manifest = load_manifest(tmp_path / "out")
    assert sorted(manifest.rounded) == ["lm_head.weight", "model.embed_tokens.weight"]
    full = tmp_path / "full"
    export_model(adapted(bits=3), full, "gguf", verify=False)
    assert (full / "model.gguf").stat().st_size > (tmp_path / "out" / "model.gguf").stat().st_size + 90_000


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
def test_lossy_is_measured_and_said(format, settings, tmp_path, capsys):
    needs(format)
    model = adapted(**{"bits": 4, **settings})
    with pytest.raises(ValueError, match=r"cannot hold .* exactly; use .* or pass lossy=True"):
        export_model(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())
    found = export_model(model, tmp_path / "out", format, lossy=True)
    assert_same(found, format)
    assert 1e-12 < found.loss.kl < 0.05
    printed = capsys.readouterr().out
    assert "lossy:" in printed and f"rounded for the format: {found.loss}" in printed
    assert verify_export(tmp_path / "out").ok


def test_gptq_needs_multiples_of_32_on_both_sides(tmp_path):
    """Foretold when the adapter is made, refused at export, kept dense on request."""
    shape = {"intermediate_size": 496}
    with pytest.raises(ValueError, match=r"gptq cannot pack a weight of 496 x 256.*multiples of 32"):
        adapted("llama", shape=shape, bits=4, export=["gptq"])
    model = adapted("llama", shape=shape, bits=4, group_size=-1)
    with pytest.raises(ValueError, match="gptq cannot pack a weight of"):
        export_model(model, tmp_path / "out", "gptq")
    export_model(model, tmp_path / "out", "gptq", lossy=True, verify=False)
    assert "6 weights are kept dense" in str(load_manifest(tmp_path / "out").lossy)


@pytest.mark.parametrize("verify", [True, False])
def test_a_loss_is_measured_without_an_engine(verify, tmp_path, capsys):
    """GPTQ's engine is not among those of the test environment."""
    export_model(adapted(bits=4, zero_point="float"), tmp_path / "out", "gptq", lossy=True, verify=verify)
    loss = load_manifest(tmp_path / "out").loss
    assert 1e-12 < loss["kl"] < 0.05 and f"KL {loss['kl']:.3g}" in capsys.readouterr().out
    assert f"KL {loss['kl']:.3g}" in (tmp_path / "out" / "README.md").read_text()


def test_scales_that_are_rounded_are_a_loss(tmp_path):
    """The grid is one that the format holds, one of its numbers is not."""
    needs("gguf")
    model = adapted(bits=4)
    next(iter(adapter_layers(model)[1].values())).dlqat_scale["default"][0, 0] = 1e-6
    found = export_model(model, tmp_path / "out", "gguf", lossy=True)
    assert_same(found, "gguf")
    assert found.loss is not None
    assert "scales or offsets of 1 weights are rounded" in load_manifest(tmp_path / "out").lossy[0]


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
    export_model(model.eval(), tmp_path / "out", "dense", verify=False)
    assert not isinstance(model, PeftModel)
    ids, reference = load_reference(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, reference)


def words_to_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, ...] of a dense little-endian bit stream down the first dimension [n * bits / 32, ...]."""
    stream = np.unpackbits(words.t().contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    codes = (stream.reshape(words.shape[1], -1, bits) << np.arange(bits)).sum(-1)
    return torch.from_numpy(codes).t()


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", grids("gptq", (32, 128, -1)), ids=as_id)
def test_gptq_files_decode_to_the_trained_weights(setting, tmp_path):
    """By the format's own rule, w = scale * (code - (stored zero + 1)); its engine runs in `make test-engines`."""
    model = adapted(**setting)
    export_model(model, tmp_path / "out", "gptq", verify=False)
    files = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == setting["bits"] and config["sym"] is (setting["zero_point"] == "none")
    bits = config["bits"]
    for name, layer in adapter_layers(model.get_base_model())[1].items():
        codes = words_to_codes(files[f"{name}.qweight"], bits)
        zeros = (words_to_codes(files[f"{name}.qzeros"].t().contiguous(), bits).t() + 1) % 2**bits
        group = files[f"{name}.g_idx"].long()
        weight = files[f"{name}.scales"].float()[group] * (codes - zeros[group])
        assert torch.equal(weight.t(), layer.quantized_weight().dequantize())
