"""What is said at injection is what comes out."""

import warnings

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import tiny_model
from export_models import EMBEDDED, adapted, base_model
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from peft_dlqat import DLQATConfig, estimate_memory, export_model, summarize


def test_of_a_whole_model_with_its_vocabulary(tmp_path, capsys):
    base = base_model("embedded")
    capsys.readouterr()  # of loading
    model = get_peft_model(base, DLQATConfig(bits=3, init="minmax", task_type="CAUSAL_LM"))
    said = capsys.readouterr().err
    assert said.strip() == str(summarize(model))
    (row,) = (row for row in summarize(model).files if row.format == "gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_model(model, tmp_path / "out", "gguf", tokenizer=AutoTokenizer.from_pretrained(EMBEDDED), verify=False)
    assert row.size == pytest.approx((tmp_path / "out" / "model.gguf").stat().st_size, rel=0.02)
    said = capsys.readouterr().err
    assert f"trained at {summarize(model).bits_per_weight:.2f} bits, are stored as Q4_0 at 4.50; {row.advice}" in said


def test_counts_and_bits():
    model = adapted("llama", bits=3, group_size=32, zero_point="integer")
    found = summarize(model)
    weights = sum(p.numel() for n, p in base_model().named_parameters() if "_proj" in n)
    everything = sum(p.numel() for p in base_model().parameters())
    assert (found.layers, found.linears, found.weights) == (14, 15, weights)
    assert found.bits_per_weight == pytest.approx(3 + (16 + 3) / 32)
    assert sum(found.in_full.values()) == everything - weights
    assert {"embedding", "output head", "norms and biases"} == set(found.in_full)
    assert found.base_size == 4 * everything


def test_the_text(capsys):
    base = tiny_model("wide llama")
    capsys.readouterr()
    get_peft_model(
        base,
        DLQATConfig(bits=3, zero_point="integer", init="minmax", bits_pattern={"layers.0.mlp.*": 4}, export=["gguf"]),
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Adapter 'default': 14 of 15 linear layers, 1.2 M weights, at 3.")
    assert "bits=3 in 11 layers; bits=4 in 3 layers" in lines[1]
    assert lines[2].startswith("In full precision: 3% of the model's numbers (") and len(lines) == 5
    assert "Q4_0 and Q5_0" in lines[4] and "scale_dtype='k_quant' takes 3.44" in lines[4]


def test_it_is_said_once_and_not_of_what_is_loaded(tmp_path, capsys):
    model = get_peft_model(tiny_model(), DLQATConfig(init="minmax", group_size=32))
    assert capsys.readouterr().err.count("Adapter 'default'") == 1
    model.add_adapter("second", DLQATConfig(init="minmax", group_size=32))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    estimate_memory(DLQATConfig(group_size=32), tiny_model().config, 1, 8)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Gemma3ForConditionalGeneration", {"vision_tower", "multi_modal_projector", "embedding and output head"}),
        ("MixtralForCausalLM", {"experts", "embedding", "output head", "other weights"}),  # the routers
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_stays_in_full_is_named(name, parts):
    (architecture,) = (row for row in ARCHITECTURES if row.name == name)
    model = get_peft_model(architecture.make(), DLQATConfig(init="minmax", group_size=-1))
    assert set(summarize(model).in_full) == parts | {"norms and biases"}


def test_a_plain_net_has_no_files():
    net = torch.nn.Sequential(torch.nn.Conv1d(4, 64, 3), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    found = summarize(get_peft_model(net, DLQATConfig(init="minmax", group_size=64, target_modules=["1"])))
    assert found.files == () and set(found.in_full) == {"convolutions", "norms and biases"}
    assert "Exported" not in str(found)


def test_weights_that_lie_on_a_grid_are_noticed(capsys):
    """As quantization-aware training leaves them, rounded to bfloat16."""
    base = tiny_model()
    for name, weight in base.named_parameters():
        if "self_attn" in name and weight.dim() == 2:
            grouped = weight.data.unflatten(1, (-1, 32))
            scale = grouped.abs().amax(-1, keepdim=True) / 7
            weight.data = (scale * (grouped / scale).round()).flatten(1).bfloat16().float()
    capsys.readouterr()
    model = get_peft_model(base, DLQATConfig(bits=4, group_size=32))
    said = capsys.readouterr().err
    assert str(summarize(model)) in said
    assert "\n8 weights lie on their grid already, as after quantization-aware training: init='mse'" in said
    get_peft_model(model.unload(), DLQATConfig(bits=3, group_size=64, init="minmax"))
    said = capsys.readouterr().err
    assert "8 weights lie on a grid already, as after quantization-aware training, but on another: bits=4, " in said
    assert "group_size=32, zero_point='none' would reproduce them" in said
