"""The logits that an artefact must give: the merged model's in float32, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..decoder import NoDecoderLayers, capture, decoder_layers, hidden_states
from ..formats import TensorInfo
from ..large.checkpoint import empty_model
from ..quant.quantizer import QuantizedWeight
from .source import Source

# As `Source.read`: some tensors, by their names.
Reader = Callable[[Iterable[str]], Iterator[tuple[TensorInfo, torch.Tensor | QuantizedWeight]]]

PROMPTS, TOKENS = 2, 32  # from 32 tokens on, llama.cpp's BLAS takes part, where it was built with one


def prompt_ids(config: PretrainedConfig, special: set[int]) -> torch.Tensor:
    """Reference prompts: random token ids [PROMPTS, TOKENS], the same for the same vocabulary."""
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor([token for token in range(config.get_text_config().vocab_size) if token not in special])
    return allowed[torch.randint(len(allowed), (PROMPTS, TOKENS), generator=generator)]


@torch.no_grad()
def reference_logits(source: Source, ids: torch.Tensor, read: Reader | None = None) -> torch.Tensor:
    """Logits [prompts, tokens, vocabulary] of the merged model, all its weights and arithmetic in float32.

    Args:
        source: the model.
        ids: token ids [prompts, tokens].
        read: where the tensors come from; defaults to the source itself.
    """
    read = read or source.read
    model: Any = empty_model(source.config, torch.float32, type(source.model)).eval()
    try:
        layers = list(decoder_layers(source.model, source.adapter_name))
    except NoDecoderLayers:
        layers = []
    inside = {name: [n for n in source.names if n.startswith(f"{name}.")] for name in layers}
    outside = set(source.names) - {name for names in inside.values() for name in names}
    _load(model, read(outside))
    if not layers:
        return model(input_ids=ids, use_cache=False).logits.float()
    blocks = [model.get_submodule(name) for name in layers]
    with hidden_states(None) as hidden:
        (calls,) = capture(model, blocks, [{"input_ids": ids}], hidden)
        state = hidden.student[0]
    for (args, kwargs), block, names in zip(calls, blocks, inside.values(), strict=True):
        _load(model, read(names))
        state = block(state, *args, **kwargs)
        block.to("meta")
    with _replaced_by(blocks, state):
        return model(input_ids=ids, use_cache=False).logits.float()


def _load(model: nn.Module, tensors: Iterator[tuple[TensorInfo, torch.Tensor | QuantizedWeight]]) -> None:
    for info, value in tensors:
        _put(model, info, value)
    model.tie_weights()  # type: ignore[operator]


def _put(model: nn.Module, info: TensorInfo, value: torch.Tensor | QuantizedWeight) -> None:
    """Give a model on the meta device one of its tensors, in float32."""
    path, _, leaf = info.name.rpartition(".")
    module: Any = model.get_submodule(path)
    dense = info.dense(value)
    # A product with a transposed view may round differently.
    dense = (dense.float() if dense.is_floating_point() else dense).contiguous()
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(dense, requires_grad=False)
    else:
        module._buffers[leaf] = dense


@contextmanager
def _replaced_by(blocks: list[nn.Module], state: torch.Tensor) -> Iterator[None]:
    """Inside the block, the decoder layers return what the last of them has returned."""
    for block in blocks:
        block.forward = lambda *_, **__: state
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
