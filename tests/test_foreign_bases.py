"""Base layers that are more than x @ W.T + bias, and weights that several modules share: trained is merged."""

from __future__ import annotations

import copy
import functools
import re
from collections import deque
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from accelerate import cpu_offload
from conftest import CONFIGS, perturb, tiny_model, tokens
from peft import PeftModel, get_peft_model
from refusals import refused
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5GemmaConfig
from transformers.pytorch_utils import Conv1D

from peft_dlqat import DLQATConfig, pack_weights
from peft_dlqat.layer import DLQATLinear, adapter_layers


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x, factor=2.0):
        return super().forward(x) * factor + 1


class Scores(nn.Linear):
    """As routers are: more than one result."""

    def forward(self, x):
        return super().forward(x).softmax(-1), x


class Falcons(nn.Linear):
    """A forward of its own that does what every linear layer does."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Net(nn.Module):
    """Two layers of which the second is given, and the head."""

    def __init__(self, second=None, tie=None):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(32, 32)
        self.b = self.a if tie == "module" else nn.Linear(32, 32) if second is None else second
        if tie == "weight":
            self.b.weight = self.a.weight
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        y = self.b(self.a(x).tanh())
        return self.head(y[0] if isinstance(y, tuple) else y)


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    return layer


def pre_hooked(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layer


def made(make):
    torch.manual_seed(1)
    return Net(make())


def config(**settings):
    return DLQATConfig(**{"bits": 3, "group_size": 16, "r": 4, "target_modules": ["a", "b"], **settings})


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scaled(32, 32),
        lambda: Scores(32, 32),
        lambda: hooked(nn.Linear(32, 32)),
        lambda: pre_hooked(nn.Linear(32, 32, bias=False)),
        lambda: hooked(Conv1D(32, 32)),
    ],
    ids=["scaled", "scores", "hooked", "pre-hooked", "hooked Conv1D"],
)
def test_a_base_layer_runs_as_it_is(make, tmp_path):
    base = made(make).eval()
    expected = base(X)
    model = get_peft_model(made(make), config(bits=8)).eval()
    assert (model(X) - expected).abs().max() < 0.05
    perturb(model)
    trained = model(X)
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(made(make), tmp_path).eval()(X), trained)
    with model.disable_adapter():
        assert torch.equal(model(X), expected)
    model.merge_adapter()
    assert torch.equal(model(X), trained)
    model.unmerge_adapter()
    assert torch.equal(model.merge_and_unload()(X), trained)


def test_a_hook_that_comes_later_is_heard():
    model = get_peft_model(Net(), config()).eval()
    before = model(X)
    seen = []
    layer = model.base_model.model.b.base_layer
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model(X), before) and seen == [1]
    handle.remove()
    assert torch.equal(model(X), before) and seen == [1]


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda m: prune.random_unstructured(m, "weight", 0.5),
    ],
    ids=["weight norm", "spectral norm", "pruning"],
)
def test_a_parametrized_weight_is_refused_or_left_out(change):
    net = Net(change(nn.Linear(32, 32)))
    with pytest.raises(ValueError, match="the weight of b is computed in each forward"):
        get_peft_model(net, config())
    with pytest.warns(UserWarning, match=r"leaves out linear layers: 1 with a parametrized weight, such as b\."):
        model = get_peft_model(net, config(target_modules="all-linear"))
    assert list(adapter_layers(model)[1]) == ["base_model.model.a", "base_model.model.head"]


def test_all_linear_knows_a_layer_by_what_it_does():
    model = get_peft_model(Net(Falcons(32, 32)), config(target_modules="all-linear")).eval()
    assert list(adapter_layers(model)[1]) == [f"base_model.model.{name}" for name in ("a", "b", "head")]
    perturb(model)
    trained = model(X)
    model.merge_adapter()
    assert torch.equal(model(X), trained)


def test_all_linear_leaves_out_routers_and_gates():
    net = Net(Scores(32, 32))
    net.head = nn.Linear(32, 1)
    said = "1 with a forward of their own (Scores), such as b; 1 with a single output, such as head."
    with pytest.warns(UserWarning, match=re.escape(said)):
        model = get_peft_model(net, config(target_modules="all-linear"))
    assert list(adapter_layers(model)[1]) == ["base_model.model.a"]


class Pair(NamedTuple):
    a: nn.Module
    b: nn.Module


def flat(kept):
    """The layers of lists, tuples and dicts, in order."""
    if isinstance(kept, nn.Module):
        return [kept]
    return [layer for entry in (kept.values() if isinstance(kept, dict) else kept) for layer in flat(entry)]


class Listed(Net):
    """Calls its layers from a list, as the mask heads of Mask2Former do, or from others, or one by another name."""

    def __init__(self, kept):
        super().__init__()
        self.layers = {
            "list": [self.a, self.b],
            "dict": {"a": self.a, "b": self.b},
            "tuple": (self.a, self.b),
            "named tuple": Pair(self.a, self.b),
            "tuple in a dict": {"layers": (self.a, [self.b])},
            "attribute": None,
        }[kept]
        if kept == "attribute":
            object.__setattr__(self, "first", self.a)

    def forward(self, x):
        for layer in flat([self.first, self.b] if self.layers is None else self.layers):
            x = layer(x).tanh()
        return self.head(x)


@pytest.mark.parametrize("kept", ["list", "dict", "tuple", "named tuple", "tuple in a dict", "attribute"])
def test_a_layer_that_its_parent_keeps_elsewhere_too(kept):
    base = Listed(kept).eval()
    expected = base(X)
    model = get_peft_model(Listed(kept), config()).eval()
    perturb(model)
    trained = model(X)
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert torch.equal(model(X), trained)
    model.unmerge_adapter()
    assert torch.equal(copy.deepcopy(model).merge_and_unload()(X), trained)
    assert torch.equal(model.unload()(X), expected)


@pytest.mark.parametrize(
    "keep",
    [
        lambda layer: {layer},
        lambda layer: [frozenset({layer})],
        lambda layer: deque([layer]),
        lambda layer: SimpleNamespace(steps=[layer]),
        lambda layer: layer.forward,
        lambda layer: functools.partial(nn.Module.__call__, layer),
        lambda layer: lambda x: layer(x),
    ],
    ids=["set", "set in a list", "deque", "object", "method", "partial", "closure"],
)
def test_a_layer_that_its_parent_keeps_where_no_other_can_be_put(keep):
    base = Net()
    base.kept = keep(base.a)
    with refused(ValueError, "a is kept in kept too", "as an attribute, or in a list", "exclude_modules"):
        get_peft_model(base, config())
    assert type(base.a) is type(base.b) is nn.Linear
    model = get_peft_model(base, config(exclude_modules=["a"]))
    model.add_adapter("second", config(exclude_modules=["a"]))


@pytest.mark.parametrize("tie", ["module", "weight"])
@pytest.mark.parametrize("targets", [["a", "b"], ["b"], "all-linear"])
def test_shared_weights(tie, targets, tmp_path):
    base = Net(tie=tie).eval()
    expected, weights = base(X), {key: value.clone() for key, value in base.state_dict().items()}
    if tie == "module" and targets == ["b"]:
        targets = ["a"]  # PEFT knows a module by its first name
    model = get_peft_model(base, config(target_modules=targets)).eval()
    perturb(model)
    trained = model(X)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(tie=tie), tmp_path).eval()(X), trained)
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(model(X), trained)
        model.unmerge_adapter()
        assert torch.equal(model(X), trained)
    with model.disable_adapter():
        assert torch.equal(model(X), expected)
    unloaded = model.unload()
    assert torch.equal(unloaded(X), expected) and not any(isinstance(m, DLQATLinear) for m in unloaded.modules())
    assert all(torch.equal(value, weights[key]) for key, value in unloaded.state_dict().items())
    again = PeftModel.from_pretrained(Net(tie=tie), tmp_path).eval().merge_and_unload()
    assert torch.equal(again(X), trained) and not any(isinstance(m, DLQATLinear) for m in again.modules())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")  # of PEFT
def test_a_tied_head_leaves_the_embedding_alone(tmp_path):
    torch.manual_seed(0)
    settings = CONFIGS["llama"]()
    settings.tie_word_embeddings = True
    base = AutoModelForCausalLM.from_config(settings)
    embedding = base.get_input_embeddings().weight.clone()
    model = get_peft_model(base, config(target_modules=["lm_head", "v_proj"], task_type="CAUSAL_LM")).eval()
    perturb(model)
    with torch.no_grad():
        trained = model(tokens()).logits
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(settings), tmp_path / "adapter").eval()
        assert torch.equal(again.get_output_embeddings().get_base_layer().weight, embedding)
        model.merge_adapter()
        assert torch.equal(model(tokens()).logits, trained)
        assert torch.equal(base.get_input_embeddings().weight, embedding)
        model.unmerge_adapter()
        assert torch.equal(model(tokens()).logits, trained)
        with pytest.warns(UserWarning, match="after merging, and is no longer tied"):
            merged = model.merge_and_unload()
        assert torch.equal(merged(tokens()).logits, trained)
        assert torch.equal(merged.get_input_embeddings().weight, embedding)
        merged.save_pretrained(tmp_path)
        assert torch.equal(type(merged).from_pretrained(tmp_path)(tokens()).logits, trained)


def test_a_head_that_is_tied_to_the_decoders_embedding_stays_so(tmp_path):
    """An encoder-decoder with an embedding each; PEFT asks for the encoder's."""
    side = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    side |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    base = AutoModelForSeq2SeqLM.from_config(T5GemmaConfig(encoder=side, decoder=side, vocab_size=64)).eval()
    model = get_peft_model(base, config(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM")).eval()
    perturb(model)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(length=5)}
    with torch.no_grad():
        trained = model(**inputs).logits
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        assert torch.equal(type(merged).from_pretrained(tmp_path).requires_grad_(False)(**inputs).logits, trained)
    assert merged.config.tie_word_embeddings


def test_several_adapters_are_what_merging_them_is():
    model = get_peft_model(Net(), config()).eval()
    model.add_adapter("other", config(bits=4))
    perturb(model)
    with pytest.warns(UserWarning, match="lies on no grid"):
        model.base_model.set_adapter(["default", "other"])
    trained = model(X)
    trained.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)
    model.merge_adapter()
    assert torch.equal(model(X), trained)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_autocast_to_the_other_16_bit_dtype_is_that_of_the_merged_model(dtypes):
    own, other = dtypes
    model = get_peft_model(Net().to(own), config()).eval()
    perturb(model)
    x = X.to(own)
    with torch.autocast("cpu", dtype=other):
        trained = model(x)
        model.merge_adapter()
        assert torch.equal(model(x), trained)


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_can_be_changed_in_place(bias):
    class InPlace(Net):
        def forward(self, x):
            y = self.a(x.unsqueeze(0))
            y += 1
            z = self.b(y).permute(0, 2, 1)
            z *= 2
            return z

    net = InPlace(nn.Linear(32, 32, bias=bias))
    model = get_peft_model(net, config()).eval()
    perturb(model)
    model(X).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


HEAD = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", "group_size": 32}


@pytest.mark.parametrize("storage", ["full", "int8"])
def test_a_merged_or_packed_head_is_not_loaded_for_w0(storage, tmp_path):
    """PEFT saves an adapted head's base weight beside the adapter, whatever it is then."""
    model = get_peft_model(tiny_model(), config(storage=storage, **HEAD)).eval()
    pack_weights(model)
    perturb(model)
    with torch.no_grad():
        trained = model(tokens()).logits
        for merged in (False, True):
            if merged:
                model.merge_adapter()
            model.save_pretrained(tmp_path, save_embedding_layers=True)
            again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
            assert torch.equal(again(tokens()).logits, trained)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_scales_and_zeros_never_train_after_transformers_loading(zero_point, tmp_path):
    get_peft_model(tiny_model(), config(zero_point=zero_point, **HEAD)).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    model = tiny_model()
    model.load_adapter(str(tmp_path), is_trainable=True)
    for layer in adapter_layers(model)[1].values():
        assert not any(tensor.requires_grad for tensor in layer.scales_and_zeros("default") if tensor is not None)
        assert layer.dlqat_A["default"].requires_grad


@pytest.mark.filterwarnings("ignore:adapters .* are active together")
def test_an_offloaded_layer_runs_with_w_hat():
    """Several adapters, so that the base layer itself runs; accelerate's hook would fetch W0 for it."""
    model = get_peft_model(Net(), config()).eval()
    model.add_adapter("other", config(bits=4))
    perturb(model)
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        expected = model(X)
        cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
        assert torch.equal(model(X), expected)
