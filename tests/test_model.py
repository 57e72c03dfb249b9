"""The usual life of an adapter, as PEFT users know it."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, calibrated, lm_batches, perturb, tiny_model, tokens
from foreign_layers import QUANTIZED, Net
from peft import LoraConfig, PeftModel, get_peft_model
from refusals import INF, NAN, both_active, refused, small_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPVisionConfig,
    DistilBertConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    ResNetConfig,
    Wav2Vec2Config,
)

import peft_dlqat.quant.op
from peft_dlqat import DLQATConfig, OtherBaseWarning, calibrate
from peft_dlqat.layer import DLQATLayer, adapter_layers
from peft_dlqat.quant.fit import initialise


def config(**kwargs):
    return DLQATConfig(**{"bits": 3, "group_size": 32, "init": "minmax", "task_type": "CAUSAL_LM", **kwargs})


def adapted(kind="llama", **kwargs):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(kind), config(**kwargs))
    perturb(model)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


def train(model, steps=5, lr=5e-4):
    """A few steps on one batch; returns the losses."""
    model.train()
    batch = lm_batches(1)[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*never calibrated.*")
        yield


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_training_lowers_the_loss_and_moves_only_m_A_B(kind, zero_point):
    model = get_peft_model(tiny_model(kind), config(zero_point=zero_point))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, steps=10)
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {"dlqat_A", "dlqat_B", "dlqat_magnitude", *(["dlqat_shift"] if zero_point == "float" else [])}
    assert {name.removesuffix(".weight").split(".")[-2] for name in moved} == trained
    assert {
        name.removesuffix(".weight").split(".")[-2] for name, p in model.named_parameters() if p.requires_grad
    } == trained


def test_several_adapters_add_set_delete():
    model = adapted()
    first = logits(model)
    model.add_adapter("other", config(bits=4, r=4, zero_point="float", group_size=16))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any(".default" in key for key in model.state_dict())
    for layer in adapter_layers(model)[1].values():
        assert list(layer.specs) == ["other"]


def test_merge_and_unload_leaves_plain_linears():
    model = adapted()
    trained = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, DLQATLayer) for module in merged.modules())
    assert torch.equal(logits(merged), trained)
    codes = merged.model.layers[0].mlp.up_proj.weight.view(128, 2, 32)
    assert max(len(group.unique()) for row in codes for group in row) <= 8


def test_unload_gives_the_base_back():
    assert torch.equal(logits(adapted().unload()), logits(tiny_model()))


@pytest.mark.parametrize("kind", ["dlqat_A", "dlqat_B", "dlqat_scale"])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_nan_among_what_chooses_the_codes_is_never_merged(kind, safe_merge):
    """Codes are integers: the merged weight would look as good as any."""
    model = adapted()
    layers = list(adapter_layers(model)[1].values())
    getattr(layers[-1], kind)["default"].data[0, 0] = torch.nan
    assert logits(model).isnan().any()
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=safe_merge)
    assert not any(layer.merged for layer in layers)
    with pytest.raises(ValueError, match="seems to be broken"):
        layers[-1].quantized_weight()


def test_unmerge_puts_the_very_tensor_back():
    model = adapted()
    layer = next(iter(adapter_layers(model)[1].values()))
    pointer = layer.get_base_layer().weight.data_ptr()
    layer.merge()
    assert layer.get_base_layer().weight.data_ptr() != pointer
    layer.unmerge()
    assert layer.get_base_layer().weight.data_ptr() == pointer
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merged_twice_warns_and_changes_nothing():
    model = adapted()
    trained = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), trained)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, monkeypatch):
    """And quantizes no weight in backward but those that it computes again, and keeps none of them."""
    grads, counts = [], []
    made = peft_dlqat.quant.op.quantized
    monkeypatch.setattr(peft_dlqat.quant.op, "quantized", lambda *args: counts.append(1) or made(*args))
    for checkpointing in (False, True):
        model = adapted()
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**lm_batches(1)[0]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert not peft_dlqat.quant.op._recomputed
    # Forward and backward; the first three layers' inputs take a gradient only under checkpointing.
    assert len(counts) == (14 + 11) + (14 + 14)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_what_checkpointing_kept_is_gone_with_the_next_forward_pass():
    """A backward pass that breaks off leaves weights behind, which a later one must not find."""
    model = adapted()
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hook = model.base_model.model.model.layers[1].mlp.up_proj.register_full_backward_pre_hook(_broken)
    with pytest.raises(RuntimeError, match="broken off"):
        model(**lm_batches(1)[0]).loss.backward()
    hook.remove()
    assert peft_dlqat.quant.op._recomputed
    model(**lm_batches(1)[0])
    assert not peft_dlqat.quant.op._recomputed


def _broken(*_: object) -> None:
    raise RuntimeError("broken off")


def test_gradient_accumulation_adds_up():
    whole, halves = adapted(), adapted()
    batch = lm_batches(1)[0]
    whole(**batch).loss.backward()
    for part in (slice(0, 2), slice(2, 4)):
        (halves(**{key: value[part] for key, value in batch.items()}).loss / 2).backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), halves.named_parameters(), strict=True):
        if a.requires_grad:
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name


def test_autocast_trains():
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**lm_batches(1)[0]).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() and grad.any() for grad in grads)


@pytest.mark.product(every=2)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_torch_compile_gives_the_same_gradients_without_graph_breaks(kind):
    torch._dynamo.reset()
    eager, compiled = adapted(kind), adapted(kind)
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    a, b = (run(input_ids=tokens()).logits.square().mean() for run in (eager, step))
    assert torch.allclose(a, b)
    a.backward()
    b.backward()
    for (name, p), (_, q) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name


def test_deepcopy_and_state_dict_round_trip():
    model = adapted()
    trained = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), trained)
    other = get_peft_model(tiny_model(), config())
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), trained)


def test_modules_to_save_and_bias_are_saved(tmp_path):
    for kind, kwargs, trained_part in (
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head"),
        ("opt", {"bias": "dlqat_only"}, "fc1.base_layer.bias"),
        ("opt", {"bias": "all"}, "final_layer_norm.bias"),
    ):
        model = get_peft_model(tiny_model(kind), config(**kwargs))
        assert any(trained_part in name and p.requires_grad for name, p in model.named_parameters())
        train(model)
        trained = logits(model.eval())
        model.save_pretrained(tmp_path / trained_part)
        reloaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path / trained_part)
        assert torch.equal(logits(reloaded), trained)


def test_patterns_set_each_layers_own_values():
    model = get_peft_model(
        tiny_model(),
        config(
            bits_pattern={"down_proj": 8, r"layers\.0\.self_attn\.q_proj": 2},
            group_size_pattern={"o_proj": -1},
            rank_pattern={"up_proj": 2},
            alpha_pattern={"up_proj": 32},
        ),
    )
    layers = {name.removeprefix("base_model.model.model."): layer for name, layer in adapter_layers(model)[1].items()}
    grids = {name: layer.specs["default"].grid for name, layer in layers.items()}
    assert grids["layers.1.mlp.down_proj"].bits == 8
    assert grids["layers.0.self_attn.q_proj"].bits == 2 and grids["layers.1.self_attn.q_proj"].bits == 3
    assert grids["layers.0.self_attn.o_proj"].group_size == 64 and grids["layers.0.self_attn.v_proj"].group_size == 32
    up = layers["layers.0.mlp.up_proj"]
    assert up.dlqat_A["default"].shape == (2, 64) and up.specs["default"].scaling == 16
    with pytest.warns(UserWarning, match="bits_pattern keys did not match"):
        get_peft_model(tiny_model(), config(bits_pattern={"nowhere": 2}))


def test_rslora_scaling():
    model = get_peft_model(tiny_model(), config(r=16, lora_alpha=8, use_rslora=True))
    layer = next(iter(adapter_layers(model)[1].values()))
    assert layer.specs["default"].scaling == 2.0


@pytest.mark.parametrize("layers", [1, [1]])
def test_layers_to_transform_selects_from_all_linear(layers):
    model = get_peft_model(tiny_model(), config(layers_to_transform=layers))
    names = adapter_layers(model)[1]
    assert len(names) == 7 and all(".layers.1." in name for name in names)


def test_the_output_head_is_left_alone():
    names = adapter_layers(adapted())[1]
    assert len(names) == 14 and not any("lm_head" in name for name in names)


def test_default_group_size_adapts_with_one_warning_that_folds_the_modules():
    with pytest.warns(UserWarning, match="group_size does not divide") as caught:
        model = get_peft_model(tiny_model(), DLQATConfig(bits=3))
    ours = [str(w.message) for w in caught if "group_size" in str(w.message)]
    assert len(ours) == 1 and "128 -> 64 in q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj in 2 layers" in ours[0]
    grids = {layer.specs["default"].grid.group_size for layer in adapter_layers(model)[1].values()}
    assert grids == {64, 128}


def test_a_group_that_we_shrink_must_not_cost_much():
    net = torch.nn.Sequential(torch.nn.Linear(96, 8))
    settings = {"bits": 3, "zero_point": "float", "init": "minmax", "target_modules": ["0"]}
    with pytest.raises(ValueError, match=r"group_size=128 does not divide in_features=96 of 0, and 32, .* 0.75 bits"):
        get_peft_model(net, DLQATConfig(**settings))
    for size in (32, -1, 16):
        get_peft_model(net, DLQATConfig(**settings, group_size=size)).unload()


def test_training_without_calibration_warns_once():
    model = get_peft_model(tiny_model(), config()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="never calibrated"):
            model(**lm_batches(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**lm_batches(1)[0])
        model.eval()
        model(**lm_batches(1)[0])


def test_a_calibrated_adapter_trains_without_warning():
    model = get_peft_model(tiny_model(), config()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, lm_batches(), steps=2, progress=False)
        model(**lm_batches(1)[0])


def test_random_init_weights_are_not_round_to_nearest():
    fresh = logits(get_peft_model(tiny_model(), config()))
    random = logits(get_peft_model(tiny_model(), config(init_weights=False)))
    assert not torch.allclose(fresh, random, atol=1e-3)


def test_a_plain_module_can_be_adapted():
    """No transformers model needed, where the targets are named."""
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))
    model = get_peft_model(net, DLQATConfig(target_modules=["0", "2"], group_size=5, bits=4))
    x = torch.randn(3, 10)
    y = model(x)
    y.sum().backward()
    assert torch.equal(model.merge_and_unload()(x), y)


def test_sequence_classification(tmp_path):
    """The new head trains beside the adapter; calibration and merging work without next-token labels."""
    from conftest import CONFIGS
    from transformers import AutoModelForSequenceClassification

    settings = CONFIGS["llama"]()
    settings.num_labels, settings.pad_token_id = 3, 0
    base = AutoModelForSequenceClassification.from_config(settings)
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 1, 2, 0])}
    model = get_peft_model(copy.deepcopy(base), config(task_type="SEQ_CLS"))
    result = calibrate(model, [batch], steps=10, objective="task", progress=False)
    assert result.loss_after < result.loss_before
    assert calibrate(model, [batch], steps=2, progress=False).loss_before >= 0
    model(**batch).loss.backward()
    assert any("score" in name and p.grad is not None for name, p in model.named_parameters())
    perturb(model)
    trained = logits(model.eval())
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(reloaded), trained)
    assert torch.equal(logits(reloaded.merge_and_unload()), trained)


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_other_tasks_train_their_heads(task, tmp_path):
    from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, BertConfig

    settings = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    auto = AutoModelForTokenClassification if task == "TOKEN_CLS" else AutoModelForQuestionAnswering
    base = auto.from_config(settings).eval()
    model = get_peft_model(copy.deepcopy(base), config(task_type=task))
    perturb(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    outputs = model.eval()(tokens())
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path)(tokens())
    for key in outputs:
        assert torch.equal(outputs[key], reloaded[key])
    assert any("modules_to_save" in name and p.requires_grad for name, p in model.named_parameters())


BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_layer_that_is_trained_in_full_has_no_adapter(tmp_path):
    """PEFT finds "pre_classifier" too, where modules_to_save says "classifier"."""
    settings = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2)
    base = AutoModelForSequenceClassification.from_config(settings).eval()
    model = get_peft_model(copy.deepcopy(base), config(task_type="SEQ_CLS"))
    assert len(adapter_layers(model)[1]) == 6
    perturb(model)
    trained = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), trained)


def test_a_head_that_no_file_would_hold_is_told():
    base = AutoModelForSequenceClassification.from_config(BertConfig(**BERT))
    with pytest.warns(UserWarning, match=r"classifier of BertFor.* is not saved .*modules_to_save=\['classifier'\]"):
        model = get_peft_model(copy.deepcopy(base), config(task_type=None))
    assert "base_model.model.classifier" in adapter_layers(model)[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is not saved")
        for settings in ({"task_type": "SEQ_CLS"}, {"task_type": None, "modules_to_save": ["classifier"]}):
            get_peft_model(copy.deepcopy(base), config(**settings))


@pytest.mark.filterwarnings("ignore:classifier of ResNet")
def test_a_model_of_images_has_no_embeddings(tmp_path):
    shapes = {"embedding_size": 32, "hidden_sizes": [32, 32], "depths": [1, 1], "num_labels": 3}
    base = AutoModelForImageClassification.from_config(ResNetConfig(**shapes)).eval()
    model = get_peft_model(copy.deepcopy(base), config(task_type=None)).eval()
    assert list(adapter_layers(model)[1]) == ["base_model.model.classifier.1"]
    perturb(model)
    x = torch.randn(2, 3, 32, 32)
    trained = model(x).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x).logits, trained)


def test_an_output_head_that_the_model_does_not_name_is_left_alone(tmp_path):
    """PEFT cannot save an adapter on it: it asks for embeddings, and speech has none."""
    conv = {"conv_dim": [32], "conv_stride": [4], "conv_kernel": [8], "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    base = AutoModelForCTC.from_config(Wav2Vec2Config(**BERT, **conv, **positions))
    with pytest.warns(UserWarning, match="1 with the name of an output head, such as lm_head"):
        get_peft_model(base, config(task_type=None)).save_pretrained(tmp_path)


class Tower(nn.Module):
    """Its own linear layer and one inside have the same last name; the one inside has a single output."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(32, 32), "head": nn.Linear(32, 1)}) for _ in "ab")
        self.head = nn.Linear(32, 32)

    def forward(self, x):
        for block in self.blocks:
            x = block["a"](x) * block["head"](x)
        return self.head(x)


@pytest.mark.parametrize("layers", [None, [1]])
def test_all_linear_means_the_layers_that_it_names(layers, tmp_path):
    """PEFT looks for suffixes: "head" would be "blocks.0.head" too, which is left out."""
    torch.manual_seed(0)
    base = Tower()
    with pytest.warns(UserWarning, match="2 with a single output"):
        model = get_peft_model(copy.deepcopy(base), config(task_type=None, layers_to_transform=layers))
    names = [name.removeprefix("base_model.model.") for name in adapter_layers(model)[1]]
    assert names == (["blocks.0.a", "blocks.1.a", "head"] if layers is None else ["blocks.1.a"])
    if layers is None:
        assert model.peft_config["default"].target_modules == r"blocks\.\d+\.a|head"
    perturb(model)
    x = torch.randn(2, 32)
    trained = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), trained)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match='"all-linear" finds no linear layer in LSTM; only torch'):
        get_peft_model(nn.LSTM(8, 8), config(task_type=None))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.norm, self.out = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)

    def forward(self, x):
        return self.out(self.norm(self.inside(x)))


def test_statistics_that_move_in_training_are_told_or_saved(tmp_path):
    base, x = Normed(), torch.randn(8, 32)
    model = get_peft_model(copy.deepcopy(base), config(task_type=None)).train()
    with pytest.warns(UserWarning, match="1 batch norms, such as .*norm, move their statistics") as caught:
        model(x)
        model(x)
    assert len([w for w in caught if "statistics" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*statistics")
        still = get_peft_model(copy.deepcopy(base), config(task_type=None)).train()
        still.base_model.model.norm.eval()
        still(x)
        kept = get_peft_model(copy.deepcopy(base), config(task_type=None, modules_to_save=["norm"])).train()
        kept(x)
    trained = kept.eval()(x)
    kept.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), trained)


def test_adapters_are_not_added_up():
    model = adapted()
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match="cannot be added up into one: each has a grid of its own"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_weights_of_other_modules_are_told():
    net = nn.ModuleDict({"a": nn.Linear(32, 32), "attention": nn.MultiheadAttention(32, 2)})
    with pytest.warns(UserWarning, match=r"60% of the weights .*1 tensors such as attention\.in_proj_weight"):
        get_peft_model(net, config(task_type=None))


def test_experts_that_are_no_linear_layers_are_told():
    shapes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shapes["num_key_value_heads"] = 2
    experts = AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=64, num_local_experts=4, **shapes))
    with pytest.warns(UserWarning, match=r"75% of the weights .*3 tensors such as .*experts\.gate_up_proj"):
        get_peft_model(experts, config())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*stay in full precision")
        get_peft_model(tiny_model(), config())


@pytest.mark.parametrize("wrap", ["PeftModel without task", "add_adapter"])
def test_every_way_of_training_warns_about_a_missing_calibration(wrap):
    model = tiny_model()
    if wrap == "add_adapter":
        model.add_adapter(config())
    else:
        model = get_peft_model(model, config(task_type=None))
    model.train()
    with pytest.warns(UserWarning, match="never calibrated"):
        model(**lm_batches(1)[0])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused. All targets are checked before any is replaced.


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

    def forward(self, input_ids):
        image = input_ids[:, None, None].float().expand(-1, -1, 3, -1)
        return SimpleNamespace(logits=self.out(self.conv(image).mean((2, 3))))


def narrow():
    """A Llama whose in_features are 48, no multiple of 32."""
    settings = CONFIGS["llama"]()
    settings.hidden_size, settings.head_dim = 48, 12
    return AutoModelForCausalLM.from_config(settings).eval()


def wide():
    return tiny_model("wide llama")


K_QUANT = {"bits": 3, "zero_point": "none", "group_size": 16, "scale_dtype": "k_quant"}
LARGE_GROUP = ("group_size=256 is larger than in_features=64", "use at most 64", "-1 for one scale a row")
EMBEDDING = ("embed_tokens is a", "Embedding", "torch.nn.Linear", "exclude_modules")


@pytest.mark.parametrize(
    "base, settings, says",
    [
        (tiny_model, {"group_size": 256}, LARGE_GROUP),
        (tiny_model, {"group_size_pattern": {"q_proj": 256}}, LARGE_GROUP),
        (tiny_model, K_QUANT, ("q_proj is not a multiple of 256", "exclude_modules", "scale_dtype='bfloat16'")),
        (
            wide,
            {**K_QUANT, "bits_pattern": {"down_proj": 4}},
            ("bits=4, zero_point='none', group_size=16 of model.layers.0.mlp.down_proj", "none of GGUF's K-quants"),
        ),
        (narrow, {"group_size": -1, "export": ["gguf"]}, ("q_proj: gguf cannot hold", "48", "leave the layer out")),
        (tiny_model, {"target_modules": ["query"]}, ("modules {'query'} not found", "check the target modules")),
        (tiny_model, {"target_modules": []}, ("target_modules", "check")),
        (tiny_model, {"layers_to_transform": [7]}, ("layers_to_transform", "[7]")),
        (tiny_model, {"target_modules": ["q_proj", "embed_tokens"]}, EMBEDDING),
        (tiny_model, {"target_modules": ".*(q_proj|embed_tokens)"}, EMBEDDING),
        (
            Image,
            {"target_modules": ["out", "conv"], "group_size": 1},
            ("conv is a", "Conv2d", "torch.nn.Linear", "exclude_modules"),
        ),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),  # a function's address is another in each process
)
def test_what_cannot_be_adapted_is_refused(base, settings, says):
    base = base()
    with refused(ValueError, *says, model=base):
        get_peft_model(base, small_config(**settings))


@pytest.mark.parametrize("way", ["PEFT's", "transformers' own"])
def test_an_impossible_second_adapter_is_refused(way):
    model = adapted() if way == "PEFT's" else tiny_model()
    settings = small_config(group_size=256)
    with refused(ValueError, *LARGE_GROUP, model=model):
        model.add_adapter(*(["second"] if way == "PEFT's" else []), settings)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, name", [("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")])
def test_a_base_weight_that_is_no_number_is_refused(value, dtype, kind, name):
    base = tiny_model(kind, dtype)
    base.get_submodule(name).weight.data[1, 2] = value
    with refused(ValueError, name, "NaN or infinity", "exclude_modules", model=base):
        get_peft_model(base, small_config())


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_base_layer_is_not_adapted(kind):
    base = Net(QUANTIZED[kind]())
    remedy = "peft_dlqat.load_packed(" if "bitsandbytes" in kind else "peft_dlqat.load_quantized"
    with refused(TypeError, "cannot adapt second", "quantized already", remedy, model=base):
        get_peft_model(base, small_config(target_modules=["first", "second"]))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_base_layer_that_was_quantized_later_is_not_merged_into(kind, how):
    """Nor is the layer before it."""
    model = get_peft_model(Net(), small_config(target_modules=["first", "second"]))
    perturb(model)
    layer = model.base_model.model.second
    layer.base_layer = QUANTIZED[kind]()
    layer.forward = layer.base_layer.forward  # the adapter can't run on this base, and need not
    says = ("cannot merge into", "quantized already", "load the base model in bfloat16")
    with refused(TypeError, *says, model=model):
        getattr(model, how)()
    with refused(TypeError, *says, model=model):
        layer.merge()


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_of_one_bad_layer_merges_none(how):
    model = adapted()
    *_, last = adapter_layers(model)[1].values()
    last.dlqat_magnitude["default"].data[0, 0] = NAN
    says = ("NaNs detected in the merged weights", "The adapter default seems to be broken")
    with refused(ValueError, *says, model=model):
        getattr(model, how)(safe_merge=True)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_adapter_for_each_row_of_a_batch_is_refused(call):
    model = adapted()
    with refused(ValueError, "adapter_names=", "not supported", "set_adapter", model=model):
        getattr(model, call)(input_ids=tokens(), adapter_names=["default"] * 4)


def test_codes_are_those_of_one_adapter_that_is_there():
    model = both_active()
    layer = next(iter(adapter_layers(model, "default")[1].values()))
    with refused(ValueError, "['default', 'second']", "no grid", "name one of", model=model):
        layer.quantized_weight()
    with refused(ValueError, "no such adapter", "name one of ['default', 'second']", model=model):
        layer.quantized_weight("other")


# ---------------------------------------------------------------------------------------------------------------------
# Two active adapters


def dlqat_layers(model):
    return [module for module in model.modules() if isinstance(module, DLQATLayer)]


def test_two_adapters_add_their_differences():
    """y = x @ (W0 + sum(w_hat_i - W0)).T, layer by layer."""
    counts = set()
    for layer in dlqat_layers(both_active()):
        w0 = layer.frozen.original().double()
        w_hats = [layer.quantized_weight(name).dequantize().double() for name in layer.specs]
        counts.add(len(w_hats))
        x = torch.randn(5, layer.in_features)
        expected, single = (x.double() @ w.t() for w in (w0 + sum(w_hat - w0 for w_hat in w_hats), w_hats[0]))
        with torch.no_grad():
            error, difference = ((y - expected).abs().max() / expected.abs().max() for y in (layer(x), single))
        assert error < 1e-6 and (len(w_hats) == 1 or difference > 1e-3)
    assert counts == {1, 2}


@pytest.mark.parametrize("one_by_one", [False, True])
def test_two_adapters_merge_and_unmerge(one_by_one):
    """Merged, both at once or one after the other, they give the sum; unmerged, W0 is the very tensor that it was."""
    model = both_active()
    layers = dlqat_layers(model)
    before = [(layer.get_base_layer().weight.data_ptr(), layer.frozen.original().clone()) for layer in layers]
    together = logits(model)
    if one_by_one:
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging second"):
            model.merge_adapter(["second"])
    else:
        model.merge_adapter()
    assert (logits(model) - together).abs().max() < 1e-5 * together.abs().max()
    for layer in layers:
        w0 = layer.frozen.original()
        expected = w0 + sum(layer.quantized_weight(name).dequantize() - w0 for name in layer.specs)
        torch.testing.assert_close(layer.get_base_layer().weight.data, expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    for layer, (pointer, weight) in zip(layers, before, strict=True):
        assert layer.get_base_layer().weight.data_ptr() == pointer
        assert torch.equal(layer.get_base_layer().weight, weight)
    assert torch.equal(logits(model), together)


def test_another_base_is_told_of(tmp_path):
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), DLQATConfig(bits=3, group_size=32, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_model(dtype=torch.bfloat16), tmp_path)
    PeftModel.from_pretrained(tiny_model(dtype=torch.bfloat16).float(), tmp_path)  # the very same numbers
    with pytest.warns(
        UserWarning, match=r"other base weights than these \(14 of 14 layers, .*; bfloat16 there, float32 here\)"
    ):
        PeftModel.from_pretrained(tiny_model(), tmp_path)
    other = tiny_model(dtype=torch.bfloat16)
    other.model.layers[1].mlp.up_proj.weight.data += 1
    with pytest.warns(UserWarning, match=r"1 of 14 layers, .*layers\.1\.mlp\.up_proj; bfloat16 there, bfloat16 here"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_another_base_is_refused_where_that_warning_is_an_error(low_cpu_mem_usage, tmp_path):
    model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path)
    other = tiny_model()
    other.model.layers[1].mlp.up_proj.weight.data += 1
    with warnings.catch_warnings(), pytest.raises(OtherBaseWarning, match="load the base model of its"):
        warnings.simplefilter("error", OtherBaseWarning)
        PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_record_without_its_tensors_is_not_believed(tmp_path):
    """A config that was trained before, for a new adapter: nothing of it was done to this one."""
    fresh = DLQATConfig(bits=2, group_size=32, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), fresh)
    calibrate(model, lm_batches(1), steps=1, progress=False)
    model.save_pretrained(tmp_path)
    config = DLQATConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    new, untouched = get_peft_model(tiny_model(), config), get_peft_model(tiny_model(), fresh)
    assert not calibrated(new)
    assert torch.equal(new.eval()(tokens()).logits, untouched.eval()(tokens()).logits)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert calibrated(loaded)


def test_the_config_is_the_callers_and_another_model_may_have_it_too():
    """PEFT's own tools rely on it. What "all-linear" stood for in one model is not what it stands for in the next."""
    given = DLQATConfig(bits=3, group_size=32, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), given)
    assert model.peft_config["default"] is given and model.base_model.peft_config["default"] is given
    calibrate(model, lm_batches(1), steps=0, progress=False)
    other = get_peft_model(tiny_model("gpt2"), given)
    assert other.peft_config["default"] is given and not calibrated(other) and calibrated(model)
    assert len(adapter_layers(other)[1]) == 8  # of GPT-2's own
    many = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    large = get_peft_model(AutoModelForCausalLM.from_config(many), given)  # PEFT shortens the list of so many names
    assert len(adapter_layers(large)[1]) == 28
    assert len(adapter_layers(get_peft_model(tiny_model("gpt2"), given))[1]) == 8
    given.target_modules = {"c_attn"}
    assert len(adapter_layers(get_peft_model(tiny_model("gpt2"), given))[1]) == 2


def test_a_config_keeps_its_layers_also_where_names_become_a_regex(tmp_path):
    given = config(task_type=None, layers_to_transform=[1], layers_pattern="blocks")
    base = Tower()
    base.side = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"a": nn.Linear(32, 1)}) for _ in "ab")})
    with pytest.warns(UserWarning, match="4 with a single output"):
        model = get_peft_model(copy.deepcopy(base), given)
    assert given.target_modules == r"blocks\.1\.a" and given.layers_to_transform == [1]
    model.save_pretrained(tmp_path)
    assert len(adapter_layers(PeftModel.from_pretrained(base, tmp_path))[1]) == 1
    given.layers_pattern = None
    other = get_peft_model(tiny_model(), given)
    assert len(adapter_layers(other)[1]) == 7 and all(".layers.1." in name for name in adapter_layers(other)[1])


@pytest.mark.parametrize(
    "fails", [lambda: nn.LSTM(8, 8), lambda: nn.Sequential(nn.Linear(2, 32))], ids=["no layer", "group size"]
)
def test_a_config_that_a_model_has_refused_is_as_it_was_for_the_next(fails):
    given = config(r=16, task_type=None)
    with pytest.raises(ValueError, match=r"finds no linear layer|group_size=32 is larger"):
        get_peft_model(fails(), given)
    assert len(adapter_layers(get_peft_model(tiny_model(), given))[1]) == 14


def test_a_second_model_around_the_first_is_refused():
    """PEFT warns of it; "all-linear" would take in the output head."""
    model = adapted()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"PeftModelForCausalLM already; .*add_adapter"):
        warnings.simplefilter("ignore")
        get_peft_model(model, config(bits=2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modules_to_save": ["lm_head", "heads"]}, "'heads' is no module of the model"),
        ({"modules_to_save": "lm_head"}, r"must be a list of module names, such as \['lm_head'\]"),
        ({"layers_to_transform": [0, 2]}, "there is no layer 2 with a target; layers are counted from 0"),
        ({"layers_to_transform": 2, "target_modules": ["q_proj"]}, "there is no layer 2 with a target"),
    ],
)
def test_settings_of_what_is_not_there_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        get_peft_model(tiny_model(), config(**changes))


def test_layers_beside_the_language_model_are_named_in_a_line():
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **shape)
    model_config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=64, **shape), image_token_id=3)
    given = {"bits": 3, "group_size": 32}
    with pytest.warns(UserWarning, match=r"8 linear layers beside the language model, such as .*exclude_modules"):
        model = get_peft_model(AutoModelForImageTextToText.from_config(model_config), DLQATConfig(**given))
    assert len(adapter_layers(model)[1]) == 8 + 7
    narrow = DLQATConfig(**given, exclude_modules=".*(vision_tower|projector).*")
    model = get_peft_model(AutoModelForImageTextToText.from_config(model_config), narrow)  # says nothing
    assert len(adapter_layers(model)[1]) == 7


def around(model):
    """The model with a LoRA around its quantized q_proj."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second adapter and of its name
        settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(model, settings, "lora").eval()


def test_other_adapters_around_a_quantized_layer():
    """LoRA's forward adds to the quantized layer's; merged into what that is merged to, it still does."""
    model = adapted()
    before = logits(model)
    outer = around(model)
    trained = logits(outer)
    assert not torch.equal(trained, before)
    says = ("q_proj is a peft.tuners.lora.layer.Linear around a quantized layer", "'lora'", "delete_adapter")
    for how in (model.merge_adapter, model.merge_and_unload, model.unload):
        with refused(ValueError, *says, model=outer):
            how()
    model.merge_adapter(["default"])
    assert torch.equal(logits(outer), trained)
    with pytest.warns(UserWarning, match="additionally merging lora"):
        outer.merge_adapter(["lora"])
    torch.testing.assert_close(logits(outer), trained)


def test_an_adapter_is_not_overwritten_by_a_new_one_of_its_name():
    """PEFT warns of a base model that has adapters already, and would make the new one in the place of the trained."""
    base = tiny_model()
    model = get_peft_model(base, config())
    perturb(model)
    trained = logits(model.eval())
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"has an adapter 'default' already, .*delete_"),
    ):
        warnings.simplefilter("ignore")
        get_peft_model(base, config(bits=2))
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("how", [{}, {"is_trainable": True, "low_cpu_mem_usage": True}])
def test_no_scales_are_searched_for_where_others_will_be_loaded(how, tmp_path, monkeypatch):
    model = get_peft_model(tiny_model(), config(init="mse"))
    perturb(model)
    model.save_pretrained(tmp_path)
    inits = []
    monkeypatch.setattr("peft_dlqat.layer.initialise", lambda *given: inits.append(given[2]) or initialise(*given))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, **how)
    assert torch.equal(logits(loaded.eval()), logits(model.eval())) and set(inits) == {"minmax"}


@pytest.mark.parametrize("names", [None, ["lora"]])
def test_another_adapter_that_was_merged_into_the_frozen_weight_is_noticed(names):
    model = adapted()
    outer = around(model)
    with pytest.raises(ValueError, match=r"no longer the one that adapter 'default' was .*load the base"):
        outer.merge_adapter(names)
    with pytest.raises(ValueError, match="no longer the one"):
        model.merge_adapter(["default"])


def test_an_adapter_whose_wrapper_is_empty_is_merged():
    """PEFT leaves the layers of a deleted adapter there."""
    model = tiny_model()
    model.add_adapter(config())
    perturb(model)
    trained = logits(model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second adapter
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "lora")
        model.delete_adapter("lora")
        model.set_adapter("default")
        wrapped = PeftModel(model, config(bits=4, target_modules=["v_proj"]), "other")
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), trained)
    assert torch.equal(logits(wrapped.merge_and_unload()), trained)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_cast_does_to_a_trained_adapter_is_said(dtype, merged):
    """It is another model; merging that one changes nothing more."""
    model = adapted()
    if merged:
        model.merge_adapter()
    with pytest.warns(OtherBaseWarning, match=f"become {str(dtype)[6:]}, but adapter 'default' was trained on others"):
        model.to(dtype)
    if merged:
        model.unmerge_adapter()
    cast = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), cast)


def test_a_cast_that_changes_no_weight_is_not_mentioned(tmp_path):
    base = tiny_model(dtype=torch.bfloat16)
    model = get_peft_model(base, config())
    perturb(model)
    trained = [layer.quantized_weight().codes for layer in dlqat_layers(model)]
    model.float().to(torch.bfloat16)
    assert all(map(torch.equal, trained, (layer.quantized_weight().codes for layer in dlqat_layers(model))))
