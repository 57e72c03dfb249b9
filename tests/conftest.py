"""Small models made on the spot; nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import re
from functools import cache

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which is chosen for good when Triton is imported, whoever does it first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from peft_dlqat.layer import DLQATLayer, adapter_layers, is_calibrated

VOCAB = 64
HIDDEN = 64
WIDE = 256  # a super-block of K-quants

CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
    "wide llama": lambda: LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDE,
        intermediate_size=2 * WIDE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
    "wide gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=WIDE, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose weights are of a trained one's size, the same at each call, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        # Freshly made models have zero biases and tiny weights; trained ones don't.
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@cache
def _model(kind: str) -> PreTrainedModel:
    return random_model(CONFIGS[kind]())


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh copy of a two-layer model of the given architecture (a key of `CONFIGS`), in eval mode."""
    return copy.deepcopy(_model(kind)).to(dtype)


def tokens(batch: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def lm_batches(count: int = 4, batch: int = 4, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Batches as a causal language model takes them."""
    ids = [tokens(batch, length, seed) for seed in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()} for x in ids]


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move all that trains of every adapter away from its start, as training would; B counts in steps of the grid."""
    generator, units = torch.Generator().manual_seed(seed), units_of(model)
    for name, parameter in model.named_parameters():
        if parameter in units:
            size = 0.2 if "magnitude" in name else 1.0 if "dlqat_B" in name else 0.1
            parameter.data += size / units[parameter] * torch.randn(parameter.shape, generator=generator).to(parameter)


def units_of(model: torch.nn.Module) -> dict[torch.nn.Parameter, float]:
    """All that trains of every adapter, each with its unit."""
    layers = [layer for layer in model.modules() if isinstance(layer, DLQATLayer)]
    return {
        parameter: tensor.unit
        for layer in layers
        for name in layer.specs
        for tensor, parameter in layer.trained(name).values()
    }


def say_calibrated(model: torch.nn.Module, calibrated: bool = True) -> None:
    """Say of every adapter that its scales and zeros were fitted to data, where this is no test of that."""
    for layer in model.modules():
        for adapter_name in getattr(layer, "specs", ()):
            layer.set_record(adapter_name, calibrated=calibrated)


def calibrated(model: torch.nn.Module) -> bool:
    """Whether the active adapter says that its scales and zeros were fitted to data."""
    adapter_name, layers = adapter_layers(model)
    return is_calibrated(layers.values(), adapter_name)


def computing(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model that it computes with: not what an adapter remembers of how it was made."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".dlqat_record." not in name}


def train(model: torch.nn.Module, batches: int = 2) -> None:
    """A few steps of AdamW on all that trains."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for batch in lm_batches(batches):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `product`, the cases that do not lie on the diagonal are slow.

    The i-th case of the diagonal has the (i mod n)-th of the n values of each `parametrize`, so that every value is
    quick in some case. `product(every=k)` keeps each k-th case of the diagonal only.
    """
    products: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("product"):
            products.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in products.values():
        every = cases[0].get_closest_marker("product").kwargs.get("every", 1)
        places = [_values(case) for case in cases]
        axes = [list(dict.fromkeys(axis)) for axis in zip(*places, strict=True)]
        diagonal = {tuple(axis[i % len(axis)] for axis in axes) for i in range(0, max(map(len, axes)), every)}
        for case, place in zip(cases, places, strict=True):
            if place not in diagonal:
                case.add_marker("slow")


def _values(case: pytest.Item) -> tuple[tuple[int, ...], ...]:
    """What each `parametrize` of a test gives this case, as identities."""
    marks = [mark.args[0] for mark in case.iter_markers("parametrize")]
    names = [re.split(r",\s*", mark) if isinstance(mark, str) else mark for mark in marks]
    return tuple(tuple(id(case.callspec.params[name]) for name in axis) for axis in names)
