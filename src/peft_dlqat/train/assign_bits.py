"""Where bits go: the layers that a model's output depends on most get more of them, under a limit of size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import DLQATConfig
from ..console import progress_bar
from ..formats import FORMATS
from ..layer_spec import LayerSpec
from ..module_names import folded
from ..placement import device_of
from ..quant.fit import initialise
from ..quant.grid import Grid
from ..quant.quantizer import round_to_nearest
from ..running import evaluating, logits_of, predicts_next, to_device
from ..targets import check_targets, is_target, out_in, resolve_all_linear
from .distillation import distillation_loss
from .fit_to_inputs import input_moments
from .model_loss import padding_mask

_CHOICES = (2, 3, 4, 5, 6, 8)
_EXACT = 1e-6  # a share of the largest rounding error, which is none


@dataclass
class _Group:
    """Layers that read the same input, as q, k and v do: engines run them as one, with the same bits.

    Attributes:
        names: the layers'.
        weights: how many they have.
        kl: KL divergence to the full-precision model with only these layers quantized, by bits.
        size: bits that their weights take with scales and zeros, by bits.
    """

    names: list[str]
    weights: int
    kl: dict[int, float]
    size: dict[int, float]


@torch.no_grad()
def assign_bits(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: DLQATConfig,
    target_bits: float,
    choices: Iterable[int] = _CHOICES,
    progress: bool = True,
) -> dict[str, int]:
    """Choose each layer's bits, so that the mean is at most `target_bits` and the model's output changes least.

    Layers that read the same input (q, k and v; gate and up) get the same. They are quantized by themselves, the
    others left in full precision, and the KL divergence to the full-precision model is measured; that at other bits
    follows from the rounding error there, weighted by the second moment of the inputs. Bits then go, one step at a
    time, where they lower the sum of the divergences most for their size.

    Args:
        model: in full precision, without adapters; it is left as it was.
        batches: keyword arguments of the model, each a dict; 2,048 tokens are enough.
        config: its targets, group sizes, kind of zero and `export` count; its bits don't.
        target_bits: mean bits a weight of the adapted layers, scales and zeros included; with `config.export` as the
            file keeps them, which may be wider than the grid.
        choices: bits to choose from; those that `config.export` can't hold are left out.
        progress: show a progress bar.

    Returns:
        Bits by layer name, for `DLQATConfig(bits_pattern=...)`.

    Raises:
        ValueError: if the model can't be adapted with this config, gives no logits, or `target_bits` is below what the
            fewest bits take; if no batch is given.

    Example:
        >>> config = DLQATConfig(group_size=32, task_type="CAUSAL_LM")
        >>> config.bits_pattern = assign_bits(model, batches, config, target_bits=3.2)
        >>> model = get_peft_model(model, config)
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has adapters already; choose bits on the model itself, before get_peft_model.")
    if config.lora is not None:
        raise ValueError(
            f"lora={config.lora!r} is not in this model yet, and changes it; merge it before, and leave it out."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # get_peft_model will say the same
        grids = _grids(config, model, sorted(set(choices)))
    layers = {name: model.get_submodule(name) for name in grids}
    kept = [to_device(batch, device_of(model)) for batch in batches]
    if not kept:
        raise ValueError("batches is empty; give at least one, of a few hundred tokens.")
    with evaluating(model):
        with _Readers(layers) as readers:
            moments = input_moments(model, layers, kept, progress)
        teachers = [logits_of(model, batch) for batch in kept]
        if unreached := [name for name, moment in moments.items() if not moment.any()]:
            warnings.warn(
                f"no token of the batches reached {folded(unreached)}, which get the fewest bits; give more batches, "
                "or leave them out by exclude_modules.",
                stacklevel=2,
            )

        def divergence() -> float:
            losses = [_divergence(model, batch, teacher) for batch, teacher in zip(kept, teachers, strict=True)]
            return max(sum(losses) / len(losses), 0.0)

        groups = [
            _measured({name: layers[name] for name in names}, grids, config.export, moments, target_bits, divergence)
            for names in progress_bar(readers.groups(), desc="measuring layers", shown=progress)
        ]
    return _assigned(groups, target_bits)


def _stored_bits(grid: Grid, formats: Iterable[str] | None) -> float:
    """Bits a weight: in the widest of the files that are wanted, or as the grid itself."""
    return max((FORMATS[name].stored_as(grid)[1] for name in formats or ()), default=grid.bits_per_weight())


def _divergence(model: nn.Module, batch: dict[str, Any], teacher: torch.Tensor) -> float:
    """Of the model as it is from the teacher's logits, in nats a token."""
    logits, labels = logits_of(model, batch), batch.get("labels")
    return distillation_loss(
        logits, teacher, labels, padding_mask(model, batch), next_token=predicts_next(model)
    ).item()


class _Readers:
    """Sees which layers read the same tensor one after the other, while it is entered."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._hooks: list[Any] = []
        self._first: dict[str, str] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def __enter__(self) -> _Readers:
        self._hooks = [layer.register_forward_pre_hook(self._watch(name)) for name, layer in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        self._last = None
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # The tensor itself is kept until the next call: an address would be used again.
            first = self._last[0] if self._last is not None and self._last[1] is args[0] else name
            self._first.setdefault(name, self._first.get(first, first))
            self._last = first, args[0]

        return hook

    def groups(self) -> list[list[str]]:
        """Names of layers that read the same input, in the model's order; of one that never ran, by itself."""
        groups: dict[str, list[str]] = {}
        for name in self._layers:
            groups.setdefault(self._first.get(name, name), []).append(name)
        return list(groups.values())


def _grids(config: DLQATConfig, model: nn.Module, choices: list[int]) -> dict[str, dict[int, Grid]]:
    """Each target's grids, by bits."""
    grids: dict[str, dict[int, Grid]] = {}
    problem: ValueError | None = None
    for bits in choices:
        try:
            uniform = replace(config, bits=bits, bits_pattern={})
            resolve_all_linear(uniform, model)
            check_targets(uniform, model)
        except ValueError as error:  # of these bits, or of all
            problem = problem or error
            continue
        for name, module in model.named_modules():
            if name and is_target(uniform, name):
                spec = LayerSpec.from_config(uniform, name, out_in(module)[1])
                grids.setdefault(name, {})[bits] = spec.grid
    if not choices:
        raise ValueError("choices is empty; give bits from 2 to 8.")
    if not grids:
        raise problem or ValueError(f"target_modules={config.target_modules!r} names no layer of the model.")
    return grids


def _measured(
    layers: dict[str, nn.Module],
    grids: dict[str, dict[int, Grid]],
    formats: Iterable[str] | None,
    moments: Mapping[str, torch.Tensor],
    target_bits: float,
    divergence: Callable[[], float],
) -> _Group:
    """A group, its divergence measured at the bits that are nearest to the target."""
    own = {name: grids[name] for name in layers}
    weights: dict[str, torch.Tensor] = {name: layer.weight.data for name, layer in layers.items()}  # type: ignore[misc]
    choices = list(next(iter(own.values())))
    errors = dict.fromkeys(choices, 0.0)
    for name, layer in layers.items():
        weight = _rows(layer, weights[name])
        for bits in choices:
            difference = _rounded(weight, own[name][bits], moments[name]) - weight.float()
            errors[bits] += (difference.square() @ moments[name]).sum().item()
    # Where bits hold the weights as they are, the output says nothing of the others.
    telling = [bits for bits in choices if errors[bits] > _EXACT * max(errors.values())] or choices
    nearest = min(telling, key=lambda bits: abs(bits - target_bits))
    try:
        for name, layer in layers.items():
            rounded = _rounded(_rows(layer, weights[name]), own[name][nearest], moments[name])
            layer.weight.data = _rows(layer, rounded).to(weights[name].dtype)  # type: ignore[union-attr]
        kl = divergence()
    finally:
        for name, layer in layers.items():
            layer.weight.data = weights[name]  # type: ignore[union-attr]
    size = {
        bits: sum(_stored_bits(own[name][bits], formats) * weight.numel() for name, weight in weights.items())
        for bits in choices
    }
    kls = {bits: kl * errors[bits] / max(errors[nearest], 1e-30) for bits in choices}
    return _Group(list(layers), sum(weight.numel() for weight in weights.values()), kls, size)


def _rows(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight as [out, in], or such a one as the layer has it."""
    return weight.T if isinstance(layer, Conv1D) else weight


def _rounded(weight: torch.Tensor, grid: Grid, moment: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] as an untrained adapter, fitted to its inputs, has it; float32."""
    scale, zero = initialise(weight, grid, "mse", importance=moment)
    return round_to_nearest(weight.float(), scale, zero, grid)[1]


def _assigned(groups: list[_Group], target_bits: float) -> dict[str, int]:
    """Bits by layer name: the fewest for all, then more, always where that lowers the divergence most for its size."""
    bits = [min(group.size) for group in groups]
    weights = sum(group.weights for group in groups)
    left = target_bits * weights - sum(group.size[fewest] for group, fewest in zip(groups, bits, strict=True))
    if left < 0:
        raise ValueError(
            f"target_bits={target_bits} is below the {target_bits - left / weights:.2f} bits a weight that the fewest "
            f"bits, {min(bits)}, take with their scales; ask for more, or for larger groups."
        )
    while steps := [
        ((group.kl[now] - group.kl[more]) / max(cost, 1.0), index, more, cost)
        for index, (group, now) in enumerate(zip(groups, bits, strict=True))
        for more in group.size
        if more > now and (cost := group.size[more] - group.size[now]) <= left
    ]:
        _, index, bits[index], cost = max(steps)
        left -= cost
    return {name: own for group, own in zip(groups, bits, strict=True) for name in group.names}
