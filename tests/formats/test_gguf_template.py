"""An export in the place of another GGUF file of the same base model, of whatever architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import perturb, random_model, say_calibrated
from export_models import SHAPE, adapted
from peft import get_peft_model
from refusals import refused
from transformers import GraniteConfig, Olmo2Config, Starcoder2Config

from peft_dlqat import DLQATConfig, export_model
from peft_dlqat.export.manifest import load_manifest

gguf = pytest.importorskip("gguf")

K_QUANT = {"scale_dtype": "k_quant", "init": "mse"}
SETTINGS = {"bits": 4, "group_size": 32, "zero_point": "none", "init": "minmax", "task_type": "CAUSAL_LM"}
# As llama.cpp's converter: architecture, config, metadata of its own, whether rows of q and k are reordered.
FOREIGN = {
    "granite": (
        lambda: GraniteConfig(
            **SHAPE, embedding_multiplier=2.0, attention_multiplier=0.1, residual_multiplier=0.5, logits_scaling=3.0
        ),
        {"attention.layer_norm_rms_epsilon": 1e-6, "embedding_scale": 2.0, "attention.scale": 0.1}
        | {"residual_scale": 0.5, "logit_scale": 3.0},
        True,
    ),
    "olmo2": (lambda: Olmo2Config(**SHAPE, pad_token_id=0), {"attention.layer_norm_rms_epsilon": 1e-5}, False),
    "starcoder2": (
        lambda: Starcoder2Config(**SHAPE, hidden_act="gelu_pytorch_tanh"),
        {"attention.layer_norm_epsilon": 1e-5},
        False,
    ),
}


def foreign(arch, dtype=None):
    """A model of an architecture that has no metadata writer here, with an adapter."""
    model = get_peft_model(random_model(FOREIGN[arch][0]()).to(dtype), DLQATConfig(**SETTINGS))
    perturb(model)
    say_calibrated(model)
    return model.eval()


def converted(path, arch="granite", changes=None, tensors=None, alignment=32, dtype=torch.float16):
    """A file as llama.cpp's converter makes it of the base model of `foreign`."""
    make, own, permuted = FOREIGN[arch]
    config = make()
    writer = gguf.GGUFWriter(path, (changes or {}).get("arch", arch))
    writer.data_alignment = alignment
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    sizes = {
        **{"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings},
        **{"embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size},
        **{"attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads},
        **{"vocab_size": config.vocab_size, "rope.dimension_count": config.hidden_size // config.num_attention_heads},
    }
    for key, value in (sizes | (changes or {})).items():
        if key in sizes:
            writer.add_uint32(f"{arch}.{key}", value)
    for key, value in {"rope.freq_base": config.rope_parameters["rope_theta"], **own, **(changes or {})}.items():
        if isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_array("general.tags", ["nobody", "knows", "this"])
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, value in ({**random_model(config).state_dict()} | (tensors or {})).items():
        if value is None:
            continue
        if permuted and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        own_name = names.get_name(name, (".weight", ".bias")) or name
        writer.add_tensor(own_name, (value.to(dtype) if value.dim() > 1 else value.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(folder):
    """Metadata and tensors of an exported file."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in reader.tensors}


@pytest.mark.filterwarnings("ignore:adapter 'default' was never trained")
@pytest.mark.product(every=2)
@pytest.mark.parametrize(
    "kind, template, settings",
    [
        ("llama", {"bits": 2, "zero_point": "float", "group_size": 16, **K_QUANT}, {"modules_to_save": ["lm_head"]}),
        ("qwen2", {"bits": 4, "zero_point": "none"}, {"bias": "all", "storage": "int4"}),
        ("qwen3", {"bits": 8, "zero_point": "none"}, {}),
        ("gemma", {"bits": 8, "zero_point": "none"}, {}),
        ("gpt2", {"bits": 8, "zero_point": "none"}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_in_the_place_of_our_own_file_of_other_types_it_is_our_own_file(kind, template, settings, tmp_path):
    """Names, orders and offsets are found by what the coarse weights look like."""
    export_model(adapted(kind, trained=False, **template), tmp_path / "template", "gguf", verify=False)
    model = adapted(kind, **{"bits": 4, "zero_point": "none", **settings})
    given = tmp_path / "template" / "model.gguf"
    export_model(model, tmp_path / "ours", "gguf", verify=False)
    export_model(model, tmp_path / "out", "gguf", template=given, verify=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "ours")


@pytest.mark.parametrize(
    "arch", ["granite", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("olmo2", "starcoder2"))]
)
def test_an_architecture_that_is_not_known_here_is_exported(arch, tmp_path):
    pytest.importorskip("xllamacpp")
    given, model = converted(tmp_path / "given.gguf", arch), foreign(arch)
    with pytest.raises(ValueError, match=rf"model_type='{arch}' cannot .* template=.*'compressed-tensors'"):
        export_model(model, tmp_path / "out", "gguf")
    found = export_model(model, tmp_path / "out", "gguf", template=given)
    assert found.ok and [row.engine for row in found.figures] == ["llama.cpp"]
    assert found.figures[0].kl < 1e-9
    # float16 rounds what stays in full precision, as the file that was given does.
    assert load_manifest(tmp_path / "out").rounded == ["model.embed_tokens.weight", "lm_head.weight"]
    fields, tensors = contents(tmp_path / "out")
    assert fields.pop("general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_0
    theirs = gguf.GGUFReader(given)
    assert fields.items() < {name: field.contents() for name, field in theirs.fields.items()}.items()
    for tensor in theirs.tensors:
        kept = tensors[tensor.name] == (tensor.tensor_type, tensor.data.tobytes())
        assert kept == (not tensor.name.startswith("blk.") or tensor.tensor_type.name == "F32")


def test_metadata_of_another_model_is_caught_by_llama_cpp(tmp_path):
    """What no config is compared with, since only the engine knows what it means."""
    pytest.importorskip("xllamacpp")
    given = converted(tmp_path / "given.gguf", changes={"logit_scale": 4.0})
    with pytest.raises(RuntimeError, match=r"llama\.cpp: .*DIFFERS"):
        export_model(foreign("granite"), tmp_path / "out", "gguf", template=given)


@pytest.mark.slow
def test_an_adapter_on_disk_and_another_alignment(tmp_path):
    given, model = converted(tmp_path / "given.gguf", alignment=128), foreign("granite")
    model.get_base_model().save_pretrained(tmp_path / "base")
    random_model(FOREIGN["granite"][0]()).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    export_model(model, tmp_path / "live", "gguf", template=given, verify=False)
    base = tmp_path / "base"
    export_model(tmp_path / "adapter", tmp_path / "disk", "gguf", base=base, template=given, verify=False)
    assert (tmp_path / "live" / "model.gguf").read_bytes() == (tmp_path / "disk" / "model.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "live" / "model.gguf")
    assert reader.alignment == 128 and all(tensor.data_offset % 128 == 0 for tensor in reader.tensors)


def test_a_base_that_was_loaded_in_fewer_digits_is_the_same_model(tmp_path):
    given, model = converted(tmp_path / "given.gguf", dtype=torch.float32), foreign("granite", torch.bfloat16)
    export_model(model, tmp_path / "out", "gguf", template=given, embeddings="q8_0", verify=False)
    _, tensors = contents(tmp_path / "out")
    assert {tensors[name][0].name for name in ("token_embd.weight", "output.weight")} == {"Q8_0"}
    norm = np.frombuffer(tensors["output_norm.weight"][1], np.float32)
    assert np.array_equal(norm, model.get_base_model().model.norm.weight.float().numpy())


def weights(name, change):
    """One of the base model's tensors, changed."""
    return {name: change(random_model(FOREIGN["granite"][0]()).state_dict()[name].clone())}


def one_number(value):
    value.view(-1)[3] += 0.01
    return value


NORM, Q, HEAD = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "made, says",
    [
        (lambda: {"tensors": weights(NORM, one_number)}, ("output_norm.weight", f"base model's {NORM}")),
        (lambda: {"tensors": weights(Q, one_number)}, ("blk.1.attn_q.weight", Q)),
        (lambda: {"tensors": weights(HEAD, one_number)}, ("output.weight", HEAD)),
        (lambda: {"tensors": weights(HEAD, lambda value: value[:-1])}, ("output.weight is [95, 256]", "[96, 256]")),
        (lambda: {"tensors": {HEAD: None}}, ("no place for 1 of the model's tensors", HEAD)),
        (
            lambda: {"tensors": {"blk.0.attn_gate.weight": torch.ones(64)}},
            ("none of 1", "blk.0.attn_gate"),
        ),
        (lambda: {"tensors": {"rope_freqs.weight": torch.ones(32)}}, ("RoPE is scaled by 'default'", "rope_freqs")),
        (lambda: {"changes": {"rope.freq_base": 5e5}}, ("rope.freq_base=500000.0", "config 10000.0")),
        (lambda: {"changes": {"block_count": 3}}, ("block_count=3", "config 2")),
        (lambda: {"changes": {"arch": "granita"}}, ("architecture 'granita'", "update the gguf package")),
    ],
)
def test_a_file_of_another_model_is_refused(made, says, tmp_path):
    given, model = converted(tmp_path / "given.gguf", **made()), foreign("granite")
    with refused(ValueError, "given.gguf", *says, model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", "gguf", template=given)


def test_what_is_no_template_is_refused(tmp_path):
    model = adapted(bits=4)
    with refused(FileNotFoundError, "no file", "gone.gguf", model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", "gguf", template=tmp_path / "gone.gguf")
    with refused(ValueError, "template='gone.gguf'", "format='mlx'", "use format='gguf'", model=model):
        export_model(model, tmp_path / "out", "mlx", template="gone.gguf")
    with refused(ValueError, "dtype='float16'", "leave dtype out", model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", "gguf", template="any.gguf", dtype="float16")
    whole = converted(tmp_path / "given.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[:-5000])
    with refused(ValueError, "short.gguf has", "copy or download it again", model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", "gguf", template=tmp_path / "short.gguf")


def test_the_very_base_with_other_words_for_rope_is_refused(tmp_path):
    """The same weights with another config, as long-context variants have."""
    export_model(adapted("qwen3", bits=8, zero_point="none"), tmp_path / "t", "gguf", verify=False)
    model = adapted("qwen3", bits=4)
    model.get_base_model().config.rope_parameters = {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    }
    with refused(ValueError, "rope.scaling.type='none'", "'yarn'", model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", "gguf", template=tmp_path / "t" / "model.gguf")


def test_llama3s_factors_are_compared(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 256}
    settings = {"bits": 8, "zero_point": "none", "shape": {**sizes, "rope_parameters": rope}}
    model, given = adapted(**settings), tmp_path / "t" / "model.gguf"
    export_model(model, tmp_path / "t", "gguf", verify=False)
    export_model(model, tmp_path / "out", "gguf", template=given, verify=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "t")
    other = {**sizes, "rope_parameters": rope | {"factor": 4.0}}
    with pytest.raises(ValueError, match=r"rope_freqs.weight does not hold the config's factors"):
        export_model(
            adapted(bits=8, zero_point="none", shape=other), tmp_path / "o", "gguf", template=given, verify=False
        )
