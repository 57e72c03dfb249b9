"""The fit of scales and zeros to what a layer multiplies: the second moment of each input channel, and its use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..console import progress_bar
from ..layer import DLQATLayer
from ..placement import device_of, several_processes
from ..quant.fit import initialise
from ..running import adapters_disabled, evaluating, forward
from ..targets import out_in
from .scales_and_zeros import set_scales_and_zeros


class InputMoments:
    """Sums up the squares of every input channel of some layers, while it is entered.

    Args:
        layers: the layers to watch, by name: adapter layers, or linear ones.

    Attributes:
        mask: which positions count, bool [batch, length], or None for all; set it before each forward pass.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._sums = {name: torch.zeros(out_in(layer)[1], device=device_of(layer)) for name, layer in layers.items()}
        self._counts = {name: torch.zeros(1, device=device_of(layer)) for name, layer in layers.items()}
        self._hooks: list[Any] = []
        self.mask: torch.Tensor | None = None

    def __enter__(self) -> InputMoments:
        """Start watching."""
        self._hooks = [layer.register_forward_pre_hook(self._watch(name)) for name, layer in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        @torch.no_grad()
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x, mask = args[0].detach().float().reshape(-1, args[0].shape[-1]), self.mask
            # A layer that sees other rows than the model's positions (an expert's, say) counts all of them.
            if mask is not None and mask.numel() == len(x):
                x = x[mask.flatten().to(x.device)]
            self._sums[name] += x.square().sum(0)
            self._counts[name] += len(x)

        return hook

    def means(self) -> dict[str, torch.Tensor]:
        """E[x²] [in] by layer, float32, over all processes; zeros for a layer that was never reached."""
        if several_processes():
            for tensor in (*self._sums.values(), *self._counts.values()):
                dist.all_reduce(tensor)
        return {name: self._sums[name] / self._counts[name].clamp(min=1) for name in self._layers}


@torch.no_grad()
def input_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]], progress: bool = True
) -> dict[str, torch.Tensor]:
    """Mean square of every input channel of every layer, in the full-precision model, without dropout.

    Args:
        model: a model, with adapters or without.
        layers: the layers to watch, by name: adapter layers, or linear ones.
        batches: keyword arguments of the model; positions that `attention_mask` [batch, length] leaves out don't
            count. Under torch.distributed each process passes its own.
        progress: show a progress bar.

    Returns:
        By layer name, E[x²] [in], float32.
    """
    with InputMoments(layers) as moments, evaluating(model), adapters_disabled(model):
        for batch in progress_bar(batches, desc="measuring inputs", shown=progress):
            mask = batch.get("attention_mask")
            moments.mask = mask.bool() if mask is not None and mask.dim() == 2 else None
            forward(model, batch)
    return moments.means()


@torch.no_grad()
def fit_to_inputs(
    layers: Mapping[str, DLQATLayer],
    moments: Mapping[str, torch.Tensor],
    adapter_name: str,
    init: str,
    progress: bool = False,
) -> None:
    """Fit every layer's scales and zeros anew to W0, an error counted by the second moment of what it multiplies.

    To first order in the inputs' correlations this minimises the squared error of the layer's *output*, which is what
    reaches the next layer, and not that of the weight.

    Args:
        layers: the layers, by name.
        moments: from [`input_moments`].
        adapter_name: whose scales and zeros.
        init: the config's `init`, one that looks at inputs.
        progress: show a progress bar.
    """
    for name, layer in progress_bar(layers.items(), desc="fitting scales and zeros", shown=progress):
        scale, zero = initialise(
            layer.frozen.original(), layer.specs[adapter_name].grid, init, importance=moments[name]
        )
        set_scales_and_zeros(layer, adapter_name, (scale, zero))
