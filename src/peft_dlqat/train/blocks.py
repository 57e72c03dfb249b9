"""Calibration by blocks: each decoder layer's grid is fitted to that layer's own output, one layer after the other.

First the grid is fitted to the inputs of each linear layer, as everywhere. Then the decoder layer with quantized
weights, fed what the calibrated ones before it give, learns to return what it returns in full precision for
full-precision inputs (EfficientQAT's Block-AP, arXiv 2407.11062, sec. 3.2; ApiQ, arXiv 2402.05147). So each layer also
makes up for the errors of those before it, and gradients never leave a layer.

Targets computed from the quantized layers' outputs instead did worse on a small pretrained Llama at 3 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from ..config import DLQATConfig
from ..decoder import Call, Hidden, HiddenStates, capture, decoder_layers, hidden_states
from ..layer import DLQATLayer, adapter_layers
from ..packing import check_packable, pack_weights
from ..placement import device_of
from ..quant.fit import WEIGHTED
from ..running import adapters_disabled, evaluating, random_state_kept
from .calibration_record import Calibration, Kept
from .grid_training import (
    Stage,
    check_active,
    check_finite,
    check_steps,
    freeze,
    grid_optimizer,
    grid_tensors,
    lowest,
    mean_over_processes,
    only_grid_trains,
    put_values,
    stay_on_grid,
    values_of,
)
from .input_moments import InputMoments, fit_to_inputs
from .recipe import RECIPE


class BlockError(NamedTuple):
    """What calibration did to one decoder layer.

    Attributes:
        name: module name of the layer.
        before: mean squared error of its output on the initial grid.
        fitted: the same on the grid fitted to the inputs of its linear layers; None where `init` looks at no inputs.
        after: the same on the frozen grid.
        kept: the grid of lowest error, which was kept: "before", "fitted", or "after" the steps.
    """

    name: str
    before: float
    fitted: float | None
    after: float
    kept: Kept


def calibrate_blocks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    steps: int = RECIPE.block_steps,
    lr: float = RECIPE.calibration_lr,
    adapter_name: str | None = None,
    progress: bool = True,
    train_adapter: bool = False,
    cache_dir: str | Path | None = None,
) -> list[BlockError]:
    """Fit s and z (or b) of one decoder layer after the other, then freeze them.

    Needs the memory of one layer's gradients and two copies of all batches' hidden states. The model runs in eval
    mode. Linear layers outside the decoder layers stay as they are. Padding, where an attention mask [batch, length]
    shows it, does not count. Global random number generators, modes and `requires_grad` are left as they were. The
    result goes to the adapter's config, and so to its model card. Then the weights are packed, as the config's
    `storage` says ([`pack_weights`]).

    Args:
        model: a model with a DL-QAT adapter, from `get_peft_model` or transformers' `add_adapter`.
        batches: finitely many dicts of the model's keyword arguments; each is one optimiser step's data.
        steps: optimiser steps on each decoder layer, after the fit to its inputs; batches are taken in turn.
        lr: learning rate at the start, falling linearly to 0, in each tensor's own unit: for s and b a linear layer's
            mean scale, for z one code.
        adapter_name: the adapter to calibrate; defaults to the active one.
        progress: show a progress bar.
        train_adapter: fit A, B, m and the shift too.
        cache_dir: an existing folder to keep hidden states in meanwhile, rather than in memory.

    Returns:
        A [`BlockError`] for each decoder layer that holds the adapter.

    Raises:
        NoDecoderLayers: a ValueError; use [`calibrate`] for such a model.
        ValueError: for an impossible argument, a model without the adapter, or no batches; `train_adapter` with packed
            storage, which would change what was fitted.
        FloatingPointError: if an error turns NaN or infinite. The grid of all layers is then as it was before.
    """
    adapter_name, layers = adapter_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr,index,operator]
    fit = Fit(adapter_name, steps, lr, train_adapter, config.init)
    check_storage(fit, config)
    check_active(layers.values(), adapter_name)
    check_packable(layers.values(), adapter_name, config)
    errors = fit_blocks(model, batches, fit, progress, cache_dir)
    config.record["calibration"] = asdict(summary(errors, fit))
    pack_weights(model, adapter_name)
    return errors


def check_storage(fit: Fit, config: DLQATConfig) -> None:
    """Raises a ValueError if A, B and m are fitted to weights that are to be packed afterwards."""
    if fit.train_adapter and config.storage != "full":
        raise ValueError(
            f"train_adapter=True with storage={config.storage!r}: A, B and m would be fitted to full weights, and "
            "packing these then changes the codes; leave one of the two out."
        )


def fit_blocks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    fit: Fit,
    progress: bool,
    cache_dir: str | Path | None = None,
) -> list[BlockError]:
    """What [`calibrate_blocks`] does, but for the record of it."""
    blocks = decoder_layers(model, fit.adapter_name)
    layers = adapter_layers(model, fit.adapter_name)[1].values()
    with (
        random_state_kept(),
        evaluating(model),
        only_grid_trains(model, [tensor for layer in layers for tensor in fit.tensors(layer)]),
        hidden_states(cache_dir) as hidden,
    ):
        calls = capture(model, list(blocks.values()), batches, hidden)
        errors = []
        bar = tqdm(blocks.items(), desc="calibrating blocks", disable=not progress)
        for index, (name, block) in enumerate(bar):
            error = calibrate_block(name, block, [call[index] for call in calls], hidden, fit)
            if error is not None:
                errors.append(error)
                bar.set_postfix(error=f"{error.before:.3g} -> {error.after:.3g}")
    return errors


@dataclass(frozen=True)
class Fit:
    """How a layer is fitted; the fields are arguments of [`calibrate_blocks`].

    `init` is the way in which the grid is first fitted to the layer's inputs; None where that was done before.
    """

    adapter_name: str
    steps: int
    lr: float
    train_adapter: bool = False
    init: str | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps, self.lr)

    def adapter_tensors(self, layer: DLQATLayer) -> list[torch.Tensor]:
        """The method's own, where they are fitted."""
        return [parameter for _, parameter in layer.trained(self.adapter_name).values()] if self.train_adapter else []

    def tensors(self, layer: DLQATLayer) -> list[torch.Tensor]:
        """All that is fitted in a linear layer."""
        return [*grid_tensors(layer, self.adapter_name), *self.adapter_tensors(layer)]

    def optimizer(self, layers: list[DLQATLayer]) -> torch.optim.Optimizer:
        """Adam, each tensor's step in a unit of its own."""
        optimizer = grid_optimizer(layers, self.adapter_name, self.lr)
        for layer in layers if self.train_adapter else ():
            for tensor, parameter in layer.trained(self.adapter_name).values():
                step = tensor.block_step
                unit = step(layer.tensors(self.adapter_name)) if callable(step) else step
                optimizer.add_param_group({"params": [parameter], "lr": self.lr * unit})
        return optimizer


def calibrate_block(name: str, block: nn.Module, calls: list[Call], hidden: Hidden, fit: Fit) -> BlockError | None:
    """Calibrate one decoder layer, and turn `hidden` from its inputs to its outputs.

    Returns:
        Its error; None, and nothing is changed in it, if it does not hold the adapter.

    Raises:
        FloatingPointError: if the error turns NaN or infinite. The layer's grid is then as it was before.
    """
    layers = {
        part: module
        for part, module in block.named_modules()
        if isinstance(module, DLQATLayer) and fit.adapter_name in module.specs
    }
    weighted = fit.init in WEIGHTED
    with InputMoments(layers if weighted else {}) as moments:
        _advance_teacher(block, calls, hidden, moments)
    error = None
    if layers:
        tensors = [tensor for layer in layers.values() for tensor in fit.tensors(layer)]
        with only_grid_trains(block, tensors) as initial:
            stages: dict[Kept, Stage] = {"before": (_mean_error(block, calls, hidden), initial)}
            check_finite(stages["before"][0], 0, fit.steps, fit.lr)
            if weighted:
                fit_to_inputs(layers, moments.means(), fit.adapter_name, str(fit.init))
                stages["fitted"] = (_mean_error(block, calls, hidden), values_of(tensors))
            if fit.steps:
                put_values(tensors, lowest(stages.values()))
                _descend(block, list(layers.values()), tensors, calls, hidden, fit)
                stages["after"] = (_mean_error(block, calls, hidden), values_of(tensors))
            best = lowest(stages.values())
            put_values(tensors, best)
        losses = {stage: loss for stage, (loss, _) in stages.items()}
        kept = next(stage for stage, (_, values) in stages.items() if values is best)
        error = BlockError(name, losses["before"], losses.get("fitted"), losses[kept], kept)
    _advance(block, calls, hidden.student)
    return error


def pass_through(block: nn.Module, calls: list[Call], hidden: Hidden) -> None:
    """Turn `hidden` from a calibrated decoder layer's inputs to its outputs."""
    _advance_teacher(block, calls, hidden)
    _advance(block, calls, hidden.student)


def _descend(
    block: nn.Module,
    layers: list[DLQATLayer],
    tensors: list[torch.Tensor],
    calls: list[Call],
    hidden: Hidden,
    fit: Fit,
) -> None:
    optimizer = fit.optimizer(layers)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / fit.steps)
    for step in range(fit.steps):
        squares, count = _squared_error(block, step % len(calls), calls, hidden)
        # Weighted by this process's share of the positions, so that the mean over processes is that over positions.
        loss = squares / mean_over_processes(count)
        check_finite(mean_over_processes(loss.detach().clone()).item(), step + 1, fit.steps, fit.lr)
        optimizer.zero_grad()
        loss.backward()
        for tensor in tensors:
            tensor.grad = mean_over_processes(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        optimizer.step()
        stay_on_grid(layers, fit.adapter_name)
        schedule.step()
    freeze(layers, fit.adapter_name)


def _run(block: nn.Module, state: torch.Tensor, call: Call) -> torch.Tensor:
    device = device_of(block)
    args, kwargs = send_to_device(call, device)
    output = block(state.to(device), *args, **kwargs)
    return output[0] if isinstance(output, tuple | list) else output


def _advance_teacher(block: nn.Module, calls: list[Call], hidden: Hidden, moments: InputMoments | None = None) -> None:
    with adapters_disabled(block):
        _advance(block, calls, hidden.teacher, hidden.counted, moments)


@torch.no_grad()
def _advance(
    block: nn.Module,
    calls: list[Call],
    states: HiddenStates,
    counted: list[torch.Tensor | None] | None = None,
    moments: InputMoments | None = None,
) -> None:
    """Replace a layer's inputs by its outputs; `moments` sees the positions that count."""
    for index, call in enumerate(calls):
        if moments is not None and counted is not None:
            moments.mask = counted[index]
        states[index] = _run(block, states[index], call)


def _squared_error(
    block: nn.Module, index: int, calls: list[Call], hidden: Hidden
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the counted positions of a batch, and how many numbers that are."""
    output = _run(block, hidden.student[index], calls[index]).float()
    target, counted = hidden.teacher[index].to(output), hidden.counted[index]
    if counted is not None:  # selected, not multiplied by 0: a row of padding may hold NaN
        counted = counted.to(output.device)
        output, target = output[counted], target[counted]
    return (output - target).square().sum(), output.new_tensor(max(1, output.numel()))


@torch.no_grad()
def _mean_error(block: nn.Module, calls: list[Call], hidden: Hidden) -> float:
    """Mean squared error over all batches and processes."""
    sums = torch.stack([torch.stack(_squared_error(block, i, calls, hidden)).double() for i in range(len(calls))])
    squares, count = mean_over_processes(sums.sum(0))
    return (squares / count).item()


def summary(errors: list[BlockError], fit: Fit) -> Calibration:
    """What the adapter's config remembers: the errors' means over the layers."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    fitted = [error.fitted for error in errors if error.fitted is not None]
    stages: tuple[Kept, ...] = ("after", "fitted", "before")
    return Calibration(
        steps=fit.steps,
        by="blocks",
        objective="output",
        loss_before=mean([error.before for error in errors]),
        loss_fitted=mean(fitted) if fitted else None,
        loss_after=mean([error.after for error in errors]),
        kept=next(stage for stage in stages if any(error.kept == stage for error in errors)),
    )
