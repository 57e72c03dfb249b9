"""Folders of GPTQ, AWQ, compressed-tensors and MLX are opened, trained inside their own numbers, and written again."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from functools import cache

import pytest
import torch
from conftest import perturb, random_model, train
from export_models import SHAPE, adapted, llama2_tokenizer
from quantized_folders import changed, compressed, digests, of_mlx
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.core_model_loading import WeightRenaming

from peft_dlqat import DLQATConfig, estimate_memory, export_model, load_quantized, summarize, verify_export
from peft_dlqat.file_layers import in_file
from peft_dlqat.large import folder_model
from peft_dlqat.large.load_quantized import is_quantized
from peft_dlqat.layer import adapter_layers

IDS = torch.arange(1, 33).view(2, 16)
SMALL = {**SHAPE, "num_hidden_layers": 1}
CONFIG = {"r": 4, "task_type": "CAUSAL_LM"}
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
MODELS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "tied": lambda: LlamaConfig(**{**SMALL, "tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=64),
}
# Bits, whether symmetric, the group (None: a row), and the dtype of scales and all else.
COMPRESSED = [
    (bits, symmetric, group, dtype)
    for bits, group in ((2, None), (3, 32), (4, 128), (5, 64), (8, 64))
    for symmetric, dtype in ((True, BF16), (False, F16))
]
OF_MLX = [(2, 128, BF16), (3, 32, F16), (4, 64, BF16), (5, 64, F32), (6, 32, BF16), (8, 64, F16)]
OWN = [
    (format, bits, zero)
    for format, widths in (("gptq", (2, 3, 4, 8)), ("awq", (4,)))
    for bits in widths
    for zero in ("none", "integer")
]


@cache
def model_of(kind):
    return random_model(MODELS[kind]())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that makes a folder: by compressed-tensors, by MLX, or by this package's own export."""

    @cache
    def made(format, *settings):
        path = tmp_path_factory.mktemp(format) / "model"
        if format == "compressed-tensors":
            pytest.importorskip("compressed_tensors")
            return compressed(model_of("qwen3" if settings[0] == 4 else "llama"), path, *settings)
        if format == "mlx":
            pytest.importorskip("mlx")
            return of_mlx(model_of("tied" if settings[0] % 2 else "llama"), path, *settings)
        bits, zero = settings
        trained = adapted(shape={"num_hidden_layers": 1}, bits=bits, zero_point=zero, scale_dtype="float16")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_model(trained, path, format, verify=False)
        torch.save(trained(IDS).logits.detach(), path.parent / "logits.pt")
        return path

    return made


def opened(path, dtype=F32, **settings):
    return load_quantized(path, DLQATConfig(**CONFIG | settings), dtype=dtype)[0]


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def export_untrained(model, *args, **kwargs):
    with pytest.warns(UserWarning, match=r"never trained .* the file as it was"):
        return export_model(model, *args, verify=False, **kwargs)


def check_round_trip(path, format, tmp_path):
    """Untrained every file comes back, and after a step at rate 0; then only adapted tensors differ."""
    model = opened(path)
    export_untrained(model, tmp_path / "same", format)
    assert digests(tmp_path / "same") == digests(path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    export_untrained(model.eval(), tmp_path / "same", format, overwrite=True)
    assert digests(tmp_path / "same") == digests(path)

    perturb(model)
    export_model(model, tmp_path / "trained", format, verify=False)
    modules = set(adapter_layers(model.get_base_model())[1])
    assert {name.rpartition(".")[0] for name in changed(path, tmp_path / "trained")} == modules
    others = {name: digest for name, digest in digests(path).items() if name != "model.safetensors"}
    assert others.items() <= digests(tmp_path / "trained").items()
    assert torch.equal(logits_of(opened(tmp_path / "trained")), logits_of(model))
    return model


@pytest.mark.product(every=3)
@pytest.mark.parametrize("settings", COMPRESSED, ids=str)
def test_compressed_tensors(folder, settings, tmp_path):
    """As transformers loads them, to the bit."""
    path, dtype = folder("compressed-tensors", *settings), settings[-1]
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model = opened(path, dtype)
    assert torch.equal(logits_of(model), logits_of(expected))
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(expected))
    model = check_round_trip(path, "compressed-tensors", tmp_path)
    (found,) = verify_export(tmp_path / "trained").figures
    assert found.kl == 0 and found.agrees, str(found)


@pytest.mark.product(every=2)
@pytest.mark.parametrize("settings", OF_MLX, ids=str)
def test_mlx(folder, settings, tmp_path):
    """As MLX decodes them, to the bit; the embedding stays quantized, and so does a tied head."""
    import mlx.core as mx
    import numpy as np

    bits, group, _ = settings
    path = folder("mlx", *settings)
    model = opened(path)
    parts = mx.load(str(path / "model.safetensors"))
    base = model.get_base_model()
    for name in (key.removesuffix(".scales") for key in parts if key.endswith(".scales")):
        own = [parts[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases")]
        expected = torch.from_numpy(np.array(mx.dequantize(parts[f"{name}.weight"], *own, group, bits)))
        layer = base.get_submodule(name)
        found = layer.decoded(layer.kept) if in_file(layer) else layer.quantized_weight().dequantize()
        assert torch.equal(found, expected), name
    assert in_file(base.get_input_embeddings())
    check_round_trip(path, "mlx", tmp_path)
    pytest.importorskip("mlx_lm")
    (found,) = verify_export(tmp_path / "trained").figures
    assert found.agrees, str(found)


@pytest.mark.product(every=3)
@pytest.mark.parametrize("settings", OWN, ids=str)
def test_what_this_package_wrote(folder, settings, tmp_path):
    """The engines of these two run in `make test-engines`."""
    path = folder(*settings)
    assert torch.equal(logits_of(opened(path)), torch.load(path.parent / "logits.pt"))
    check_round_trip(path, settings[0], tmp_path)


def test_several_files_and_a_tokenizer(folder, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folder("gptq", 4, "none"), path)
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    llama2_tokenizer(300).save_pretrained(path)
    (path / ".cache").mkdir()
    (path / ".cache" / "lock").write_text("of the hub's client")
    model, tokenizer = load_quantized(path, DLQATConfig(**CONFIG))
    assert tokenizer("We use").input_ids
    export_untrained(model, tmp_path / "same", "gptq")
    kept = {name: digest for name, digest in digests(path).items() if not name.startswith(".cache")}
    assert digests(tmp_path / "same") == kept
    perturb(model)
    with pytest.raises(ValueError, match=r"tokenizer=.* has no meaning here"):
        export_model(model, tmp_path / "other", "gptq", tokenizer=tokenizer, verify=False)
    with pytest.raises(ValueError, match=r"lies in .*, of which a copy is made"):
        export_model(model, path / "out", "gptq", verify=False)
    first = next(iter(tensors))
    weight_map[first] = next(file for file in set(weight_map.values()) if file != weight_map[first])
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"as model.safetensors.index.json says"):
        opened(path)


def test_an_adapter_is_saved_for_this_very_folder(folder, tmp_path):
    path = folder("awq", 4, "integer")
    model = opened(path)
    train(model)
    assert all(layer.moved("default") for layer in adapter_layers(model)[1].values())
    model.eval().save_pretrained(tmp_path / "adapter")
    again, _ = load_quantized(path, tmp_path / "adapter", dtype=F32)
    assert torch.equal(logits_of(again), logits_of(model))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits_of(merged), logits_of(model))
    export_model(model, tmp_path / "live", "awq", verify=False)
    export_model(tmp_path / "adapter", tmp_path / "disk", "awq", base=path, verify=False)
    assert digests(tmp_path / "live") == digests(tmp_path / "disk")
    with pytest.raises(ValueError, match="belongs to another file than"):
        load_quantized(tmp_path / "live", tmp_path / "adapter")
    shutil.copytree(path, tmp_path / "moved")
    model = opened(tmp_path / "moved")
    perturb(model)
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, tmp_path / "moved/model.safetensors")
    with pytest.raises(ValueError, match="has changed since it was opened"):
        export_model(model, tmp_path / "no", "awq", verify=False)


def test_another_format_is_written_anew(folder, tmp_path):
    model = opened(folder("gptq", 4, "none"))
    perturb(model)
    export_model(model, tmp_path / "out", "mlx", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["quantization"] == {"group_size": 32, "bits": 4}
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))


def test_in_16_bits_the_numbers_of_the_file_stay(folder, tmp_path):
    path = folder("gptq", 4, "integer")  # whose dense tensors are float32
    model = opened(path, BF16)
    perturb(model)
    export_model(model, tmp_path / "out", "gptq", verify=False)
    assert not changed(path, tmp_path / "out") & {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"}
    model.get_base_model().model.norm.weight.data += 1
    with pytest.raises(ValueError, match=r"norm.weight is no longer as the file has it"):
        export_model(model, tmp_path / "other", "gptq", verify=False)


def test_sizes_are_told_without_reading(folder):
    path = folder("compressed-tensors", 4, False, 128, F16)
    estimate = estimate_memory(DLQATConfig(**CONFIG), str(path), 1, 64)
    with pytest.raises(ValueError, match="qwen3 has quantized weights, whose sizes its files tell; download"):
        estimate_memory(DLQATConfig(**CONFIG), AutoConfig.from_pretrained(path), 1, 64)
    model = opened(path)
    frozen = sum(layer.get_base_layer().weight.nbytes for layer in adapter_layers(model)[1].values())
    assert estimate.frozen == frozen
    summary = summarize(model)
    assert summary.base_size == (path / "model.safetensors").stat().st_size
    (own,) = (row for row in summary.files if row.format == "compressed-tensors")
    assert (own.size, own.stored, own.problem) == (summary.base_size, "pack-quantized int4", "")


def spoilt(path, to, config=None, tensors=None, **more):
    """A copy of a folder with changes to its section on quantization, or its config, and to its tensors."""
    shutil.copytree(path, to)
    content = json.loads((to / "config.json").read_text())
    for name in ("quantization_config", "quantization"):
        if name in content:
            content[name] |= config or {}
    (to / "config.json").write_text(json.dumps(content | more))
    (to / "quantize_config.json").unlink(missing_ok=True)
    if tensors is not None:
        found = load_file(to / "model.safetensors")
        tensors(found)
        save_file(found, to / "model.safetensors")
    return to


Q = "model.layers.0.self_attn.q_proj"


def without(name):
    return lambda tensors: tensors.pop(f"{Q}.{name}")


def with_changed(name, change):
    return lambda tensors: tensors.update({f"{Q}.{name}": change(tensors[f"{Q}.{name}"].clone())})


def first(value):
    def changed_first(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return changed_first


REFUSED = {
    "other bits": (
        {"bits": 8},
        None,
        r"qweight is \[64, 256\] of torch.int32, but 8 bits in groups of 32, as the con",
    ),
    "other groups": ({"group_size": 64}, None, r"qzeros is \[16, 32\].* but 4 bits in groups of 64"),
    "groups that do not divide": ({"group_size": 96}, None, "groups of 96 do not divide its 512 inputs"),
    "groups of half a byte": ({"bits": 3, "group_size": 4}, None, "4 codes of 3 bits fill no whole bytes"),
    "no group size": ({"group_size": 0}, None, "group_size=0 must be a positive integer, or -1"),
    "bits of no codes": ({"bits": 5}, None, "bits=5 must be one of 2, 3, 4, 8"),
    "the other version": ({"checkpoint_format": "gptq_v2"}, None, "a zero point is 7, not 8: .* version 1 stores one"),
    "a kernel's packing": (
        {"checkpoint_format": "marlin"},
        None,
        r"packing is \['marlin'\], and only 'gptq' and 'gptq",
    ),
    "marlin": ({"is_marlin_format": True}, None, "only 'gptq' and 'gptq_v2' can be opened"),
    "other words": ({"pack_dtype": "int64"}, None, "pack_dtype='int64' must be 'int32'"),
    "an adapter of its own": ({"adapter": {"name": "lora"}}, None, "makes another model of its weights"),
    "rounded inputs": ({"activation": {"mode": "w4afp8"}}, None, "activation=.* makes another model of its weights"),
    "bits of a fraction": ({"bits": 4.0}, None, "bits=4.0 must be one of 2, 3, 4, 8"),
    "layers that are not quantized": ({"dynamic": {r"-:.*q_proj": {}}}, None, "the config says that it is not"),
    "no regex": ({"dynamic": {"+:(": {}}}, None, "'\\(' is no regex"),
    "no dict": ({"dynamic": ["q_proj"]}, None, r"dynamic=\['q_proj'\] must be an object"),
    "no codes at all": (
        None,
        lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("qweight")],
        "quantized in gptq as its config.json says, but none of its tensors is a 'qweight'",
    ),
    "no zeros": (None, without("qzeros"), "q_proj: it has no qzeros"),
    "no scales": (None, without("scales"), "q_proj: it has no scales"),
    "order of inputs": (None, with_changed("g_idx", first(3)), "not grouped with their neighbours, as with desc_act"),
    "NaN": (None, with_changed("scales", first(torch.nan)), "q_proj: it holds NaN or infinity"),
    "a tensor more": (
        None,
        lambda tensors: tensors.update(more=torch.ones(2)),
        "has 1 tensors that .* no place for: more",
    ),
    "a bias of numbers": (
        None,
        lambda tensors: tensors.update({f"{Q}.bias": torch.ones(256)}),
        "no place for: .*q_proj.b",
    ),
    "a bias of bytes": (
        None,
        lambda tensors: tensors.update({f"{Q}.bias": torch.zeros(256, dtype=torch.int8)}),
        "q_proj.bias in a dtype that is none of F64",
    ),
    "an order of bytes": (
        None,
        with_changed("g_idx", lambda tensor: tensor.to(torch.int8)),
        "q_proj.g_idx in a dtype that is none of F64",
    ),
    "a tensor less": (None, lambda tensors: tensors.pop("model.norm.weight"), "lacks 1 tensors .*: model.norm.weight"),
    "another size": (
        None,
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(255)}),
        r"has model.norm.weight \[255\] of torch.float32, and the config's model has it \[256\]",
    ),
    "another method": ({"quant_method": "bitsandbytes"}, None, "quantized by 'bitsandbytes', and only GPTQ, AWQ"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_opened(folder, name, tmp_path):
    config, tensors, message = REFUSED[name]
    path = spoilt(folder("gptq", 4, "none"), tmp_path / "model", config, tensors)
    with pytest.raises(ValueError, match=message):
        opened(path)


@pytest.mark.parametrize(
    ("format", "settings", "config", "message"),
    [
        ("awq", (4, "integer"), {"version": "gemv"}, "its version is 'gemv', and only 'gemm' can be opened"),
        ("awq", (4, "integer"), {"zero_point": False}, "zero_point=False"),
        ("awq", (4, "integer"), {"bits": 8}, "bits=8 must be one of 4"),
        ("awq", (4, "integer"), {"modules_to_not_convert": ["q_proj"]}, "the config says that it is not"),
        ("awq", (4, "integer"), {"modules_to_not_convert": 3}, "'int' object is not iterable"),
        ("mlx", (3, 32, F16), {"group_size": 96}, "group_size=96 must be one of 128, 64, 32"),
        ("mlx", (3, 32, F16), {"mode": "mxfp4"}, "its mode is 'mxfp4', and only 'affine'"),
        ("mlx", (3, 32, F16), {Q: {"bits": 4}}, "weight is .* but 4 bits in groups of 32"),
        ("mlx", (3, 32, F16), {Q: False}, "the config says that it is not"),
        (
            "compressed-tensors",
            (3, True, 32, BF16),
            {"version": "0.17.1"},
            "it has 3 bits, which .* before version 0.18",
        ),
        ("compressed-tensors", (3, True, 32, BF16), {"kv_cache_scheme": {"num_bits": 8}}, "makes another model"),
        ("compressed-tensors", (3, True, 32, BF16), {"ignore": ["re:.*q_proj"]}, "the config says that it is not"),
        ("compressed-tensors", (3, True, 32, BF16), {"sparsity_config": {"format": "sparse-bitmask"}}, "another mod"),
    ],
)
def test_what_cannot_be_opened_of_other_formats(folder, format, settings, config, message, tmp_path):
    path = spoilt(folder(format, *settings), tmp_path / "model", config)
    with pytest.raises(ValueError, match=message):
        opened(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"type": "float"}}, "type='float' of its weights must be 'int'"),
        ({"weights": {"strategy": "block"}}, "strategy='block' of its weights"),
        ({"input_activations": {"num_bits": 8}}, "it has input_activations, which are rounded too"),
        ({"format": "nvfp4-pack-quantized"}, "its format is 'nvfp4-pack-quantized', and only 'pack-quantized'"),
        ({"targets": ["Embedding"]}, "the config says that it is not"),
        ({"weights": {"symmetric": False}}, "it has no weight_zero_point"),
    ],
)
def test_schemes_that_cannot_be_opened(folder, change, message, tmp_path):
    path = folder("compressed-tensors", 3, True, 32, BF16)
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    scheme = section["config_groups"]["group_0"]
    for key, value in change.items():
        scheme[key] = {**(scheme.get(key) or {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        opened(spoilt(path, tmp_path / "model", section))


def test_pruned_weights_that_are_stored_as_others_are_opened(folder, tmp_path):
    path, pruned = folder("compressed-tensors", 3, True, 32, BF16), {"format": "dense", "global_sparsity": 0.1}
    spoilt(path, tmp_path / "model", {"sparsity_config": pruned})
    assert torch.equal(logits_of(opened(tmp_path / "model")), logits_of(opened(path)))


def test_two_sections_must_agree(folder, tmp_path):
    path = spoilt(folder("gptq", 4, "none"), tmp_path / "model")
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    (path / "quantize_config.json").write_text(json.dumps(section | {"damp_percent": 0.1}))
    opened(path)
    (path / "quantize_config.json").write_text(json.dumps(section | {"bits": 3}))
    with pytest.raises(
        ValueError, match=r"in quantization_config and in quantize_config.json how it is quantized, and"
    ):
        opened(path)
    (path / "config.json").write_text((path / "config.json").read_text().replace("quantization_config", "other"))
    with pytest.raises(ValueError, match=r"bits=3|but 3 bits"):
        opened(path)
    (path / "quantize_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no quantized weights, as far as its config.json says"):
        opened(path)


def test_a_tied_head_has_one_weight(folder, tmp_path):
    path = spoilt(folder("gptq", 4, "none"), tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"lm_head.weight beside those for .*embed_tokens.weight|but its config ties the"
    ):
        opened(path)

    def copied(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def head_alone(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    one = opened(spoilt(folder("gptq", 4, "none"), tmp_path / "two", None, copied, tie_word_embeddings=True))
    two = opened(spoilt(folder("gptq", 4, "none"), tmp_path / "one", None, head_alone, tie_word_embeddings=True))
    assert torch.equal(logits_of(one), logits_of(two))
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
    for model, name in ((one, "two"), (two, "one")):
        export_untrained(model, tmp_path / "same", "gptq", overwrite=True)
        assert digests(tmp_path / "same") == digests(tmp_path / name)
    path = folder("mlx", 3, 32, F16)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="which are the same tensor; use exclude_modules"):
        opened(path, target_modules=["lm_head"])


def test_models_that_mlx_has_in_another_way_are_refused(folder, tmp_path):
    path = spoilt(folder("mlx", 4, 64, BF16), tmp_path / "model", model_type="gpt_neox")
    with pytest.raises(ValueError, match=r"is a 'gpt_neox', and for mlx it is known of .*llama"):
        opened(path)


def test_a_bias_of_zeros_is_none(folder, tmp_path):
    """Old GPTQ files have one for each layer, and buffers of RoPE."""
    more = {f"{Q}.bias": torch.zeros(256), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    path = spoilt(folder("gptq", 4, "none"), tmp_path / "model", None, lambda tensors: tensors.update(more))
    assert torch.equal(logits_of(opened(path)), logits_of(opened(folder("gptq", 4, "none"))))


def test_base_is_for_gguf_files(folder):
    path = folder("gptq", 4, "none")
    with pytest.raises(ValueError, match=r"has no meaning for .*, whose folder has its own config"):
        load_quantized(path, DLQATConfig(**CONFIG), base=path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder './nowhere'"):
        load_quantized("./nowhere", DLQATConfig(**CONFIG))


def test_what_is_quantized_is_known_by_its_config(folder, tmp_path):
    assert is_quantized(folder("mlx", 4, 64, BF16)) and is_quantized("somewhere.gguf")
    model_of("llama").save_pretrained(tmp_path / "plain")
    assert not is_quantized(tmp_path / "plain") and not is_quantized(tmp_path / "nowhere")
    for section, expected in (
        ({"quant_method": "awq", "version": "gemv"}, True),  # which says so itself
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, False),
        ({"load_in_4bit": True}, False),
    ):
        (tmp_path / "plain" / "config.json").write_text(json.dumps({"quantization_config": section}))
        assert is_quantized(tmp_path / "plain") is expected
    (tmp_path / "plain" / "quantize_config.json").write_text("{}")
    assert is_quantized(tmp_path / "plain")


def test_no_other_weights_may_lie_beside(folder, tmp_path):
    path = spoilt(folder("gptq", 4, "none"), tmp_path / "model")
    save_file({"a": torch.ones(1)}, path / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"has consolidated.safetensors beside the files that its weights are in"):
        opened(path)


@pytest.mark.parametrize(
    "settings",
    [("gptq", 3, "integer"), ("awq", 4, "integer"), ("compressed-tensors", 3, False, 32, F16), ("mlx", 6, 32, BF16)],
    ids=str,
)
def test_some_rows_at_a_time_are_read_as_all(folder, settings, monkeypatch):
    expected = adapter_layers(opened(folder(*settings)))[1]
    monkeypatch.setattr(folder_model, "_PIECE", 2**13)  # 32 rows
    for name, layer in adapter_layers(opened(folder(*settings)))[1].items():
        assert torch.equal(layer.frozen.as_kept(), expected[name].frozen.as_kept())


def test_what_transformers_converts_is_refused(folder, monkeypatch):
    changes = [WeightRenaming("mlp.up_proj", "mlp.up_proj")]  # another tensor of the same name, as with a transpose
    monkeypatch.setattr(folder_model, "get_model_conversion_mapping", lambda model: changes)
    with pytest.raises(ValueError, match=r"1 tensors that transformers converts .*: .*mlp.up_proj"):
        opened(folder("gptq", 4, "none"))


def test_experts_are_refused_as_what_they_are(folder, monkeypatch, tmp_path):
    def as_experts(tensors):
        for name in [name for name in tensors if "mlp.up_proj" in name]:
            tensors[name.replace("up_proj", "experts.0.up_proj")] = tensors.pop(name)

    changes = [WeightRenaming(r"mlp.experts.0.up_proj", "mlp.experts.up_proj")]
    monkeypatch.setattr(folder_model, "get_model_conversion_mapping", lambda model: changes)
    path = spoilt(folder("gptq", 4, "none"), tmp_path / "model", None, as_experts)
    with pytest.raises(ValueError, match=r"1 tensors that transformers converts .*experts.0.up_proj"):
        opened(path)
