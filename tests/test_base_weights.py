"""What becomes of the base model's weights: a LoRA adapter merged, embeddings rounded; new, saved, and from disk."""

import json
import warnings

import pytest
import torch
from conftest import CONFIGS, perturb, say_calibrated, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_dlqat import DLQATConfig, OtherBaseWarning, adapters_disabled, export_model, load_packed, summarize
from peft_dlqat.formats.q8_0 import round_q8_0
from peft_dlqat.large.checkpoint import empty_model
from peft_dlqat.layer import adapter_layers


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(2, 8)).logits


@pytest.fixture
def base(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base, dtype=torch.float32):
    return type(tiny_model()).from_pretrained(base, dtype=dtype).eval()


def trained_lora(base, folder, **settings):
    """The logits of a LoRA adapter that was trained, and its folder."""
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(**{**arguments, **settings})).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return logits(model)


def adapted(base, config, dtype=torch.float32):
    model = get_peft_model(load(base, dtype), config).eval()
    say_calibrated(model)
    perturb(model)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 2}}], ids=str)
def test_a_trained_lora_is_what_is_quantized(base, tmp_path, settings):
    expected = trained_lora(base, tmp_path / "lora", **settings)
    config = DLQATConfig.from_lora(tmp_path / "lora", bits=8, group_size=32, target_modules="all-linear")
    assert (config.r, config.lora_alpha) == (4, 8)
    model = get_peft_model(load(base), config).eval()
    with adapters_disabled(model):  # the teacher
        torch.testing.assert_close(logits(model), expected)
    near, far = (logits(model) - expected).abs().max(), (logits(load(base)) - expected).abs().max()
    assert near < far / 5  # scales fit W0 + BA


def test_its_adapter_belongs_to_the_base_model(base, tmp_path):
    """Saved, moved, loaded in memory, exported and loaded packed from disk: the same bits."""
    trained_lora(base, tmp_path / "lora")
    settings = {"bits": 4, "group_size": 32, "storage": "int8", "embeddings": "q8_0"}
    model = adapted(base, DLQATConfig.from_lora(tmp_path / "lora", target_modules="all-linear", **settings))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "lora").rename(tmp_path / "gone")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = PeftModel.from_pretrained(load(base), tmp_path / "moved").eval()
    assert torch.equal(logits(again), logits(model))
    again.load_adapter(tmp_path / "moved", "same")  # whose LoRA is in the model already
    again.set_adapter("same")
    assert torch.equal(logits(again), logits(model))
    for name, what in (("live", model), ("disk", tmp_path / "moved")):
        export_model(what, tmp_path / name, "dense", verify=False, **({"base": base} if name == "disk" else {}))
    live, disk = (load(tmp_path / name) for name in ("live", "disk"))
    assert torch.equal(logits(live), logits(disk))
    new = DLQATConfig.from_lora(tmp_path / "gone", target_modules="all-linear", **settings)
    packed = load_packed(base, new)
    in_full = get_peft_model(load(base), new).eval()
    assert torch.equal(packed.get_input_embeddings().weight, in_full.get_input_embeddings().weight)
    pairs = zip(adapter_layers(packed)[1].values(), adapter_layers(in_full)[1].values(), strict=True)
    assert all(torch.equal(a.quantized_weight().dequantize(), b.quantized_weight().dequantize()) for a, b in pairs)


def test_a_lora_that_is_another_one_now_is_noticed(base, tmp_path):
    trained_lora(base, tmp_path / "lora")
    adapted(base, DLQATConfig.from_lora(tmp_path / "lora", bits=4, group_size=32)).save_pretrained(tmp_path / "saved")
    trained_lora(base, tmp_path / "saved" / "lora", lora_alpha=16)
    with pytest.warns(OtherBaseWarning, match="other base weights"):
        PeftModel.from_pretrained(load(base), tmp_path / "saved")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "no plain LoRA, but has use_dora=True; merge it yourself"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
    ],
)
def test_what_is_more_than_a_and_b_is_refused(base, tmp_path, settings, says):
    trained_lora(base, tmp_path / "lora", **settings)
    with pytest.raises(ValueError, match=says):
        DLQATConfig.from_lora(tmp_path / "lora", bits=4)


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_a_lora_of_another_model_is_refused(base, tmp_path):
    trained_lora(base, tmp_path / "lora")
    config = DLQATConfig.from_lora(tmp_path / "lora", bits=4, group_size=32, target_modules="all-linear")
    with pytest.raises(ValueError, match="load the base model that it was trained on"):
        get_peft_model(tiny_model("wide llama"), config)
    with pytest.raises(ValueError, match=r"adapts model\.layers\.0\.mlp\.down_proj, which is no module here"):
        get_peft_model(tiny_model("gpt2"), config)
    adapted(base, DLQATConfig(bits=4, group_size=32)).save_pretrained(tmp_path / "dlqat")
    with pytest.raises(ValueError, match=r"holds a .*DLQAT adapter, not a LoRA"):
        DLQATConfig.from_lora(tmp_path / "dlqat", bits=4)


def test_a_lora_whose_base_has_another_name_is_told_of(base, tmp_path):
    """By PEFT: it may be a copy."""
    trained_lora(base, tmp_path / "lora")
    model = load(base)
    model.name_or_path = "somebody/else"
    with pytest.warns(UserWarning, match="was renamed from .*base' to 'somebody/else'"):
        get_peft_model(model, DLQATConfig.from_lora(tmp_path / "lora", bits=4, group_size=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounded_embeddings_are_what_the_file_keeps(base, tmp_path, dtype, capsys):
    pytest.importorskip("gguf")
    config = DLQATConfig.for_engine("llama.cpp", "Q4_0", task_type="CAUSAL_LM")
    assert config.embeddings == "q8_0"
    model = adapted(base, config, dtype)
    base_of = model.get_base_model()
    for weight in (base_of.get_input_embeddings().weight, base_of.get_output_embeddings().weight):
        assert weight.dtype == dtype and torch.equal(round_q8_0(weight), weight)
    summary = summarize(model)
    assert "embedding, rounded to Q8_0" in str(summary)
    unmade = empty_model(CONFIGS["llama"](), dtype)
    planned = summarize(get_peft_model(unmade, DLQATConfig.for_engine("llama.cpp", "Q4_0")))
    assert planned.files == summary.files
    export_model(model, tmp_path / "out", "gguf", verify=False)
    manifest = json.loads((tmp_path / "out" / "dlqat_export.json").read_text())
    assert manifest["exact"]
    from gguf import GGUFReader, dequantize

    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for name, weight in (("token_embd", base_of.get_input_embeddings()), ("output", base_of.get_output_embeddings())):
        tensor = found[f"{name}.weight"]
        assert tensor.tensor_type.name == "Q8_0"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(values, weight.weight.detach().float())


def test_tied_embeddings_are_rounded_once_and_stay_tied(tmp_path):
    model = tiny_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    before = model.get_input_embeddings().weight
    get_peft_model(model, DLQATConfig(bits=4, group_size=32, embeddings="q8_0"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is before


def test_what_trains_is_not_rounded():
    model, expected = tiny_model(), tiny_model().lm_head.weight
    get_peft_model(model, DLQATConfig(bits=4, group_size=32, embeddings="q8_0", modules_to_save=["lm_head"]))
    assert torch.equal(model.lm_head.original_module.weight, expected)
    assert not torch.equal(model.get_input_embeddings().weight, tiny_model().get_input_embeddings().weight)


def test_all_adapters_of_a_model_share_its_embeddings():
    rounded, plain = (DLQATConfig(bits=4, group_size=32, embeddings=value) for value in ("q8_0", None))
    model = get_peft_model(tiny_model(), rounded)
    model.add_adapter("same", rounded)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is rounded to Q8_0, .* wants it as the base"):
        model.add_adapter("other", plain)
    with pytest.raises(ValueError, match="rounded to Q8_0"):
        get_peft_model(model.unload(), plain)  # it stays rounded: reloaded on the base, this would be another model
    with pytest.raises(ValueError, match=r"is as the base model has it, .* wants it rounded"):
        get_peft_model(tiny_model(), plain).add_adapter("other", rounded)


def test_an_adapter_is_not_loaded_with_other_embeddings(tmp_path):
    model = get_peft_model(tiny_model(), DLQATConfig(bits=4, group_size=32, embeddings="q8_0"))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "embeddings": None}))
    with pytest.raises(ValueError, match="embeddings: 8 in the file, 0 here"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_rows_that_no_block_divides_are_refused():
    model = tiny_model()
    model.set_input_embeddings(torch.nn.Embedding(64, 40))
    with pytest.raises(ValueError, match=r"rows of a multiple of 32, but model\.embed_tokens\.weight has rows of 40"):
        get_peft_model(model, DLQATConfig(bits=4, group_size=32, embeddings="q8_0"))


@pytest.mark.parametrize("kept", [1, 0])
def test_a_lora_that_lacks_tensors_is_refused(base, tmp_path, kept):
    """Merged in part, it would be another model."""
    trained_lora(base, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    names = sorted({key.partition(".lora_")[0] for key in tensors})[:kept]
    save_file({key: value for key, value in tensors.items() if key.partition(".lora_")[0] in names}, file)
    config = DLQATConfig.from_lora(str(tmp_path / "lora"), bits=4, group_size=32, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"lacks A and B of .*; copy or download it again"):
        get_peft_model(load(base), config)


def test_a_lora_folder_is_saved_by_its_whole_path(base, tmp_path, monkeypatch):
    trained_lora(base, tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    assert DLQATConfig(bits=4, lora="lora").lora == str(tmp_path / "lora")
    assert DLQATConfig(bits=4, lora=tmp_path / "lora").lora == str(tmp_path / "lora")


def test_embeddings_of_what_is_no_transformers_model_are_refused():
    config = DLQATConfig(bits=4, group_size=32, embeddings="q8_0", target_modules=["0"])
    with pytest.raises(ValueError, match="needs a model of transformers, not a Sequential"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
