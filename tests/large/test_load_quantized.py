"""A quantized file is opened, trained inside its own blocks, and written again as the same kind of file."""

from __future__ import annotations

import copy
import json
import warnings
from functools import cache

import pytest
import torch
from conftest import perturb, random_model, train
from export_models import CONFIGS, GEMMA, SHAPE, llama2_tokenizer
from gguf_files import write_experts, write_gguf
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from peft_dlqat import (
    DistillationLoss,
    DLQATConfig,
    TeacherCache,
    distillation_loss,
    export_model,
    load_quantized,
)
from peft_dlqat.formats.gguf_file import GGUFFile
from peft_dlqat.large.load_quantized import in_file_config
from peft_dlqat.layer import adapter_layers

pytestmark = pytest.mark.xdist_group("llama.cpp")
gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

IDS = torch.arange(1, 33).view(2, 16)
SMALL = {**SHAPE, "num_hidden_layers": 1}
MODELS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "tied": lambda: LlamaConfig(**{**SMALL, "tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=64),
    "gemma3": lambda: Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 6}),  # one without a window
}
FILES = [
    ("llama", "Q4_K_M"),
    ("qwen3", "Q5_K_S"),
    ("gemma3", "Q2_K"),
    ("tied", "Q3_K_M"),
    ("llama", "Q4_0"),
    ("qwen3", "legacy"),
    ("tied", "float"),
]
CONFIG = {"r": 4, "task_type": "CAUSAL_LM"}


@cache
def model_of(kind):
    return random_model(MODELS[kind]())


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A function that opens a file of a model and a mixture: the file, and the model."""

    @cache
    def made(kind, mixture):
        folder = tmp_path_factory.mktemp(f"{kind}-{mixture}")
        model_of(kind).config.save_pretrained(folder)
        return write_gguf(model_of(kind), folder / "small.gguf", mixture)

    def open_(kind, mixture, **settings):
        path = made(kind, mixture)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*in types without a grid")
            return path, load_quantized(path, DLQATConfig(**CONFIG | settings), base=path.parent)[0]

    return open_


def decoded(path):
    """transformers' model of a file's weights as the gguf package decodes them, by transformers' names."""
    config = json.loads((path.parent / "config.json").read_text())
    kind = CONFIGS[{"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])]
    own = type(kind()).from_pretrained(path.parent)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=own, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize(("kind", "mixture"), FILES)
def test_untrained_it_is_what_the_file_says(opened, kind, mixture):
    path, model = opened(kind, mixture)
    expected = decoded(path)
    state = expected.state_dict()
    _, layers = adapter_layers(model.get_base_model())
    assert layers
    for name, layer in layers.items():
        assert torch.equal(layer.quantized_weight("default").dequantize(), state[f"{name}.weight"]), name
        assert torch.equal(layer.weight + 0, state[f"{name}.weight"])
    with torch.no_grad():
        logits = expected(IDS).logits
        assert torch.equal(model(IDS).logits, logits)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, logits)


@pytest.mark.product(every=2)
@pytest.mark.parametrize(("kind", "mixture"), FILES)
def test_it_is_written_again(opened, tmp_path, kind, mixture):
    path, model = opened(kind, mixture)
    # Nothing of a trained tensor is copied: its place is empty until its own blocks come.
    with pytest.warns(UserWarning, match="never trained .* the file as it was"):
        export_model(model, tmp_path / "same", "gguf", verify=False)
    assert (tmp_path / "same" / "model.gguf").read_bytes() == path.read_bytes()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    with pytest.warns(UserWarning, match="never trained"):
        export_model(model, tmp_path / "same", "gguf", verify=False, overwrite=True)
    assert (tmp_path / "same" / "model.gguf").read_bytes() == path.read_bytes()

    perturb(model)
    export_model(model, tmp_path / "trained", "gguf", verify=False)
    written = tmp_path / "trained" / "model.gguf"
    old, new = GGUFFile.open(path), GGUFFile.open(written)
    assert (old.metadata, old.tensors) == (new.metadata, new.tensors)
    names = model.get_base_model().origin.names
    adapted = {names[f"{name}.weight"] for name in adapter_layers(model.get_base_model())[1]}
    assert {name for name in old.tensors if not torch.equal(old.read(name), new.read(name))} == adapted
    (tmp_path / "trained" / "config.json").write_text((path.parent / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(decoded(written)(IDS).logits, model(IDS).logits)


def test_of_a_mixture_of_experts_the_linear_layers_train(tmp_path):
    kind = Qwen3MoeConfig(
        **SMALL, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True
    )
    random_model(kind).config.save_pretrained(tmp_path)
    path = write_experts(random_model(kind), tmp_path / "experts.gguf")
    with pytest.warns(UserWarning, match="experts"):
        model, _ = load_quantized(path, DLQATConfig(**CONFIG), base=tmp_path, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=kind, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected.eval()(IDS).logits)
    with pytest.warns(UserWarning, match="never trained"):
        export_model(model, tmp_path / "same", "gguf", verify=False)
    assert (tmp_path / "same" / "model.gguf").read_bytes() == path.read_bytes()
    perturb(model)
    export_model(model, tmp_path / "trained", "gguf")  # asks llama.cpp
    old, new = GGUFFile.open(path), GGUFFile.open(tmp_path / "trained" / "model.gguf")
    changed = {name for name in old.tensors if not torch.equal(old.read(name), new.read(name))}
    assert changed == {f"blk.0.attn_{name}.weight" for name in ("q", "k", "v", "output")}
    for half in ("ffn_gate_exps", "ffn_up_exps"):
        path = write_experts(random_model(kind), tmp_path / "half.gguf", without=half)
        with pytest.raises(ValueError, match=f"lacks blk.0.{half}; it is not whole"):
            load_quantized(path, DLQATConfig(**CONFIG), base=tmp_path)


def test_types_without_a_grid_stay_as_they_are(opened):
    path, _ = opened("tied", "float")
    with pytest.warns(UserWarning, match="4 linear layers are decoded .* types without a grid"):
        model, _ = load_quantized(path, DLQATConfig(**CONFIG), base=path.parent)
    _, layers = adapter_layers(model.get_base_model())
    assert {name.rpartition(".")[2] for name in layers} == {"o_proj", "gate_proj", "up_proj"}
    with pytest.raises(ValueError, match=r"types that are not trained \({'IQ4_\w+': 1, 'IQ4_\w+': 1}\)"):
        load_quantized(path, DLQATConfig(**CONFIG), base=path.parent, allow_frozen=False)


def test_it_trains_and_is_saved_for_this_very_file(opened, tmp_path):
    path, model = opened("llama", "Q4_K_M")
    train(model)
    model.eval()
    names = {kind for layer in adapter_layers(model)[1].values() for kind in layer.trained("default")}
    assert names == {"A", "B", "magnitude", "shift"}
    assert all(layer.moved("default") for layer in adapter_layers(model)[1].values())
    model.save_pretrained(tmp_path / "adapter")
    assert "sha256" in (tmp_path / "adapter" / "README.md").read_text()
    again, _ = load_quantized(path, tmp_path / "adapter", base=path.parent)
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(again(IDS).logits, logits)
        assert not torch.equal(logits, decoded(path)(IDS).logits)
        merged = copy.deepcopy(model).merge_and_unload()
        assert torch.equal(merged(IDS).logits, logits)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, logits)

    other = path.with_name("other.gguf")
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    other.write_bytes(content)
    with pytest.raises(ValueError, match="belongs to another file"):
        load_quantized(other, tmp_path / "adapter", base=path.parent)
    with pytest.raises(ValueError, match="is none of a file"):
        PeftModel.from_pretrained(copy.deepcopy(model_of("llama")), tmp_path / "adapter")
    # Past load_quantized, by PEFT: each weight's own checksum tells.
    weight = adapter_layers(again)[1]["base_model.model.model.layers.0.mlp.up_proj"].get_base_layer().weight
    weight[0, 20] ^= 1
    with pytest.raises(ValueError, match="belongs to another quantized file"):
        again.load_adapter(tmp_path / "adapter", "second")


def test_the_teacher_is_the_file(opened):
    path, model = opened("llama", "Q4_0")
    perturb(model)
    expected = decoded(path)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    bare = model.unload()
    with torch.no_grad():
        assert torch.equal(bare(IDS).logits, expected(IDS).logits)
    assert all(parameter.is_floating_point() for parameter in bare.parameters())


def test_a_small_file_is_mended_by_its_original(opened):
    _, model = opened("tied", "Q3_K_M")
    original, losses = model_of("tied"), []
    loss = DistillationLoss(model, teacher=original)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(6):
        divergence = loss(model(input_ids=IDS), IDS)
        divergence.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(divergence.item())
    loss.remove()
    assert all(parameter.grad is None for parameter in original.parameters())
    with torch.no_grad():
        expected = distillation_loss(model(IDS).logits, original(IDS).logits, IDS)
    assert expected < 0.8 * losses[0]
    with pytest.raises(ValueError, match="leave out teacher= or cache="):
        DistillationLoss(model, teacher=original, cache=TeacherCache())


def test_an_adapter_on_disk_is_written_into_its_file(opened, tmp_path):
    path, model = opened("llama", "Q4_0")
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    export_model(model, tmp_path / "live", "gguf", verify=False)
    export_model(tmp_path / "adapter", tmp_path / "disk", "gguf", base=path, verify=False)
    assert (tmp_path / "live" / "model.gguf").read_bytes() == (tmp_path / "disk" / "model.gguf").read_bytes()


def test_the_file_has_its_own_tokenizer_and_config_and_llama_cpp_runs_it(tmp_path):
    tokenizer = llama2_tokenizer(300)
    model = random_model(LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer), "tie_word_embeddings": True}))
    path = write_gguf(model, tmp_path / "small.gguf", "Q4_0", tokenizer)
    model, found = load_quantized(path, DLQATConfig(**CONFIG))
    text = "We use this licence, and others."
    assert found(text).input_ids == [1, *tokenizer(text).input_ids]
    perturb(model)
    verification = export_model(model, tmp_path / "out", "gguf")
    kl = {row.engine: row.kl for row in verification.figures}
    assert kl["transformers"] == 0.0
    assert kl["llama.cpp"] < 1e-9

    model.config.save_pretrained(tmp_path / "base")
    for size, message in ((400, "has 400 tokens, and .* 335"), (300, r"token 260 is 'thenotice'")):
        other = llama2_tokenizer(size)
        content = json.loads(other.backend_tokenizer.to_str())
        other.save_pretrained(tmp_path / "base")
        saved = tmp_path / "base" / "tokenizer.json"
        token = next(token for token, index in content["model"]["vocab"].items() if index == 260)
        content["model"]["vocab"] = {
            "thenotice" if known == token else known: index for known, index in content["model"]["vocab"].items()
        }
        content["model"]["merges"] = []
        saved.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_quantized(path, DLQATConfig(**CONFIG), base=tmp_path / "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "llama.block_count is 1, and the config makes it 2"),
        ({"intermediate_size": 256}, "llama.feed_forward_length is 512, and the config makes it 256"),
        ({"rms_norm_eps": 1e-5}, "layer_norm_rms_epsilon"),
        ({"vocab_size": 97}, "llama.vocab_size is 96, and the config makes it 97"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope.scaling"),
        ({"tie_word_embeddings": True}, "output.weight beside the tensor of .*, but the config ties the two"),
        ({"attention_bias": True}, "lacks 4 tensors"),
    ],
)
def test_another_models_config_is_refused(opened, tmp_path, changes, message):
    path, _ = opened("llama", "Q4_K_M")
    LlamaConfig(**{**SMALL, **changes}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_quantized(path, DLQATConfig(**CONFIG), base=tmp_path)


def test_what_transformers_leaves_out_of_a_config_is_seen(opened):
    path, _ = opened("qwen3", "legacy")
    with pytest.raises(ValueError, match=r"qwen3.attention.key_length is 64, and the config makes it 128; .*base="):
        load_quantized(path, DLQATConfig(**CONFIG))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits=3 has no meaning"),
        ({"bits_pattern": {"q_proj": 3}}, "bits_pattern has no meaning"),
        ({"storage": "int4"}, "storage='int4' has no meaning"),
        ({"method": "l4q"}, "trains the step"),
        ({"bias": "all"}, "modules_to_save and bias"),
        ({"gradient": "lowrank", "magnitude": "row"}, "gradient='lowrank'"),
        ({"target_modules": ["embed_tokens"]}, "no linear layer"),
    ],
)
def test_settings_that_a_file_has_of_its_own_are_refused(opened, settings, message):
    path, _ = opened("llama", "Q4_K_M")
    with pytest.raises(ValueError, match=message):
        load_quantized(path, DLQATConfig(**CONFIG | settings), base=path.parent)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_that_is_the_embedding_is_refused(opened):
    with pytest.raises(ValueError, match=r"lm_head and model.embed_tokens.weight, which are the same .*exclude_modul"):
        opened("tied", "Q3_K_M", target_modules=["lm_head"])


def test_a_weight_that_is_no_number_is_refused(tmp_path):
    def spoilt(blocks):
        blocks = blocks.clone()
        blocks[5, 0:2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)  # NaN
        return blocks

    model = model_of("llama")
    model.config.save_pretrained(tmp_path)
    path = write_gguf(model, tmp_path / "small.gguf", "Q4_0", changed={"blk.0.ffn_up.weight": spoilt})
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight holds NaN or infinity"):
        load_quantized(path, DLQATConfig(**CONFIG), base=tmp_path)


def test_in_16_bits_the_vectors_of_the_file_stay(opened, tmp_path):
    path, _ = opened("llama", "Q4_K_M")
    model, _ = load_quantized(path, DLQATConfig(**CONFIG), base=path.parent, dtype=torch.bfloat16)
    perturb(model)
    export_model(model, tmp_path / "out", "gguf", verify=False)
    old, new = GGUFFile.open(path), GGUFFile.open(tmp_path / "out" / "model.gguf")
    assert torch.equal(old.read("output_norm.weight"), new.read("output_norm.weight"))
    model.get_base_model().model.norm.weight.data += 1
    with pytest.raises(ValueError, match=r"norm.weight is no longer as the file has it"):
        export_model(model, tmp_path / "other", "gguf", verify=False)
    with pytest.raises(ValueError, match="dtype='float16' has no meaning here"):
        export_model(model, tmp_path / "other", "gguf", dtype="float16", verify=False)


def test_others_read_the_heads_weight_decoded(opened):
    """As TRL's loss does; and whoever ties weights finds the bytes' own parameter."""
    path, model = opened("tied", "Q3_K_M")
    base = model.get_base_model()
    expected = decoded(path).get_output_embeddings().weight
    assert torch.equal(base.get_output_embeddings().weight[3:5] + 0, expected[3:5])
    hidden = torch.randn(2, 256)
    assert torch.equal(base.get_output_embeddings()(hidden), hidden @ expected.t())
    base.tie_weights()
    assert base.get_output_embeddings().kept is base.get_input_embeddings().kept


def test_a_merged_model_is_of_no_file_any_more(opened):
    path, _ = opened("llama", "Q4_0")
    model, _ = load_quantized(path, DLQATConfig(**CONFIG), base=path.parent)
    merged = model.merge_and_unload()
    expected = merged(input_ids=IDS).logits
    anew = get_peft_model(merged, DLQATConfig(bits=8, group_size=64, **CONFIG))
    grids = {layer.specs["default"].grid.bits for layer in adapter_layers(anew)[1].values()}
    assert grids == {8}
    assert torch.allclose(anew(input_ids=IDS).logits, expected, atol=0.1)
    assert getattr(merged, "origin", None) is None


def test_every_adapter_belongs_to_the_file(opened, tmp_path):
    path, _ = opened("llama", "Q4_0")
    model, _ = load_quantized(path, DLQATConfig(**CONFIG), base=path.parent)
    model.add_adapter("second", in_file_config(DLQATConfig(**CONFIG)))
    assert model.peft_config["second"].file_sha256 == model.peft_config["default"].file_sha256
    other = in_file_config(DLQATConfig(**CONFIG))
    other.file_sha256 = "0" * 64
    with pytest.raises(ValueError, match="belongs to another file: its sha256 is 0000"):
        model.add_adapter("third", other)


def test_no_kernel_of_a_card_decodes_a_file(opened):
    nvidia = pytest.importorskip("peft_dlqat.quant.nvidia")
    _, model = opened("llama", "Q4_0")
    layer = next(iter(adapter_layers(model)[1].values()))
    assert not nvidia.supports(layer.frozen.as_kept(), layer.quantizer("default"))


@pytest.mark.parametrize("name, value", [("lora", "somewhere"), ("embeddings", "q8_0")])
def test_what_changes_the_files_weights_is_refused(opened, name, value):
    path, _ = opened("llama", "Q4_0")
    with pytest.raises(ValueError, match=f"{name} changes weights that a quantized file keeps"):
        load_quantized(path, DLQATConfig(**CONFIG, **{name: value}), base=path.parent)
