"""The logits that an artefact must give, in float32, one decoder layer in memory at a time.

The model as it trained is run itself: its own modules, with their adapter active and unmerged. What was written is run
as a fresh model of the same class, from the tensors alone. Where the two differ, merged is not trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig

from ..console import progress_bar
from ..decoder import NoDecoderLayers, capture, decoder_layers, hidden_states
from ..formats import TensorInfo
from ..large.checkpoint import empty_model
from ..quant.quantizer import QuantizedWeight
from .source import Source

# As `Source.read`: some tensors, by their names.
Reader = Callable[[Iterable[str]], Iterator[tuple[TensorInfo, torch.Tensor | QuantizedWeight]]]

PROMPTS = 2
TOKENS, MOST_TOKENS = 32, 128


def prompt_ids(config: PretrainedConfig, special: set[int]) -> torch.Tensor:
    """Reference prompts: random token ids [PROMPTS, tokens], the same for the same vocabulary and window.

    They are longer than an attention window, if that is short.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or 0
    length = max(TOKENS, min(window + 8, MOST_TOKENS))
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    return allowed[torch.randint(len(allowed), (PROMPTS, length), generator=generator)]


# Packages whose trainers put a forward of their own into a model.
_TRAINERS = ("trl.",)


@torch.no_grad()
def trained_logits(source: Source, ids: torch.Tensor, notes: list[str]) -> torch.Tensor:
    """Logits [prompts, tokens, vocabulary] of the model as it trained: its adapter active, nothing merged; float32.

    Args:
        source: the model, which stays as it is.
        ids: token ids [prompts, tokens].
        notes: gets what the user should know.
    """
    layers = _layers(source)
    weights = [tensor for block in layers.values() for tensor in (*block.parameters(), *block.buffers())]
    made = _made_buffers(source, notes)
    # The layers' weights come one layer at a time.
    model: Any = copy.deepcopy(source.model, {id(tensor): _empty(tensor) for tensor in weights}).eval()
    blocks = [model.get_submodule(name) for name in layers]
    _make_ready(source, model, "", made, {inner for block in blocks for inner in block.modules()})
    # TRL's computes the loss in a way of its own, and runs the very model that it was made for. One that is not a
    # trainer's is part of what the model is.
    if getattr(vars(model).get("forward"), "__globals__", {}).get("__name__", "").startswith(_TRAINERS):
        del model.forward

    def filled() -> Iterator[nn.Module]:
        for name, block in layers.items():
            own = copy.deepcopy(block).eval()
            _make_ready(source, own, f"{name}.", made)
            yield own

    return _run(model, blocks, filled(), ids)


@torch.no_grad()
def written_logits(
    source: Source,
    ids: torch.Tensor,
    read: Reader | None = None,
    gelu: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits [prompts, tokens, vocabulary] of a fresh model that is given the merged tensors; float32.

    Args:
        source: the model.
        ids: token ids [prompts, tokens].
        read: where the tensors come from; defaults to the source itself.
        gelu: in the place of the model's GELU.
    """
    read = read or source.read
    model: Any = empty_model(source.config, torch.float32, type(source.model)).eval()
    if gelu is not None:
        for name in gelus(model):
            model.set_submodule(name, _Activation(gelu))
    layers = list(_layers(source))
    inside = {name: [n for n in source.names if n.startswith(f"{name}.")] for name in layers}
    outside = set(source.names) - {name for names in inside.values() for name in names}
    _load(model, read(outside))
    blocks = [model.get_submodule(name) for name in layers]

    def filled() -> Iterator[nn.Module]:
        for block, names in zip(blocks, inside.values(), strict=True):
            _load(model, read(names))
            yield block
            block.to("meta")

    return _run(model, blocks, filled(), ids)


def gelus(model: nn.Module) -> list[str]:
    """Names of a model's modules that are GELU."""
    return [name for name, module in model.named_modules() if "gelu" in type(module).__name__.lower()]


class _Activation(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.forward = function


def _layers(source: Source) -> dict[str, nn.Module]:
    """The decoder layers by name; none where the model has no list of them."""
    try:
        return decoder_layers(source.model, source.adapter_name)
    except NoDecoderLayers:
        return {}


def _run(model: Any, blocks: list[nn.Module], filled: Iterator[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """The model's logits, `filled` running in the place of its `blocks`, which have no weights."""
    if not blocks:
        return model(input_ids=ids, use_cache=False).logits.float()
    with hidden_states(None) as hidden:
        (calls,) = capture(model, blocks, [{"input_ids": ids}], hidden)
        state = hidden.student[0]
    pairs = zip(calls, filled, strict=True)
    for (args, kwargs), block in progress_bar(pairs, desc="computing reference logits", total=len(blocks)):
        found = block(state, *args, **kwargs)
        state = found[0] if isinstance(found, tuple) else found
    with _replaced_by(blocks, state if not isinstance(found, tuple) else (state,)):
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
def _replaced_by(blocks: list[nn.Module], state: Any) -> Iterator[None]:
    """Inside the block, the decoder layers return what the last of them has returned."""
    for block in blocks:
        block.forward = lambda *_, **__: state
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor without numbers."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _make_ready(
    source: Source, part: nn.Module, prefix: str, made: dict[str, torch.Tensor], apart: Collection[nn.Module] = ()
) -> None:
    """Make a copy of a part of the model run by itself: on the CPU, in float32, the adapter active, nothing merged.

    Args:
        source: the model.
        part: the copy.
        prefix: what the names of its tensors begin with in the model.
        made: buffers by name, in the place of the model's own.
        apart: modules of the copy that are left alone.
    """
    for name, module in part.named_modules():
        if module in apart:
            continue
        remove_hook_from_module(module)  # accelerate's, which moves it to its device
        if isinstance(module, BaseTunerLayer) and module.merged:
            module.unmerge()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module._active_adapter, module._disable_adapters = [source.adapter_name], False
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                if tensor is None:
                    continue
                key = f"{prefix}{name}.{leaf}" if name else f"{prefix}{leaf}"
                value: torch.Tensor | None = source.on_disk(key, tensor.dtype) if tensor.is_meta else tensor.data.cpu()
                value = made.get(key, value)
                if value is None:
                    continue  # what the adapter stands in the place of
                value = value.float() if value.is_floating_point() else value
                tensors[leaf] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value


def _made_buffers(source: Source, notes: list[str]) -> dict[str, torch.Tensor]:
    """Buffers that no file has, as a fresh model makes them, where the live model's are those rounded.

    `model.to(torch.bfloat16)` rounds RoPE's frequencies, too.
    """
    live = dict(source.model.named_buffers())
    fresh = empty_model(source.config, torch.float32, type(source.model))
    kept = fresh.state_dict()
    made = {
        name: value
        for name, value in fresh.named_buffers()
        if name not in kept
        and name in live
        and live[name].dtype != value.dtype
        and torch.equal(value.to(live[name].dtype), live[name].cpu())
    }
    if made:
        name = next(iter(made))
        dtype = str(live[name].dtype).removeprefix("torch.")
        notes.append(
            f"the model trained with {name} rounded to {dtype}, by model.to(...), but the export is loaded with it in "
            f"float32; load the base model by from_pretrained(..., dtype='{dtype}'), which does not round it"
        )
    return made
