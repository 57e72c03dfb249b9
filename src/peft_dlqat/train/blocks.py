"""Calibration by blocks: each decoder layer's scales and zeros are fitted to that layer's own output, one by one.

First they are fitted to the inputs of each linear layer, as everywhere. Then the decoder layer with quantized
weights, fed what the calibrated ones before it give, learns to return what it returns in full precision for
full-precision inputs (EfficientQAT's Block-AP, arXiv 2407.11062, sec. 3.2; ApiQ, arXiv 2402.05147). So each layer also
makes up for the errors of those before it, and gradients never leave a layer.

Targets computed from the quantized layers' outputs instead did worse on a small pretrained Llama at 3 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..console import progress_bar
from ..decoder import Call, Hidden, HiddenStates, capture, decoder_layers, hidden_states
from ..layer import DLQATLayer
from ..placement import device_of
from ..quant.fit import WEIGHTED
from ..running import adapters_disabled, evaluating
from .descent import Descent, Log, Stage, keep_lowest, mean_over_processes
from .fit_to_inputs import InputMoments, fit_to_inputs
from .scales_and_zeros import only_these_train


class BlockError(NamedTuple):
    """What calibration did to one decoder layer.

    Attributes:
        name: module name of the layer.
        before: mean squared error of its output with the initial scales and zeros.
        fitted: the same with those fitted to the inputs of its linear layers; None where that was not done here.
        after: the same with those that were kept, rounded as they ship.
        kept: the stage of lowest error, which was kept: "before", "fitted", or "after" the steps.
    """

    name: str
    before: float
    fitted: float | None
    after: float
    kept: Stage


def calibrate_by_blocks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    descent: Descent,
    init: str | None,
    progress: bool = True,
    cache_dir: str | Path | None = None,
    log: Log | None = None,
) -> list[BlockError]:
    """Calibrate one decoder layer after the other.

    Args:
        model: a model with adapters.
        batches: dicts of the model's keyword arguments; each is one optimiser step's data, and all are kept.
        descent: how the layers are fitted; its steps are those on each.
        init: the way in which scales and zeros are first fitted to the inputs; None to leave that out.
        progress: show a progress bar.
        cache_dir: an existing folder to keep hidden states in meanwhile, rather than in memory.
        log: called after each step; steps count on over the decoder layers.

    Returns:
        A [`BlockError`] for each decoder layer that holds the adapter.

    Raises:
        NoDecoderLayers: before anything is changed.
        ValueError: if there are no batches, or no position of them counts.
        FloatingPointError: if an error turns NaN or infinite.
    """
    blocks = decoder_layers(model, descent.adapter_name)
    errors: list[BlockError] = []
    with evaluating(model), hidden_states(cache_dir) as hidden:
        calls = capture(model, list(blocks.values()), batches, hidden)
        bar = progress_bar(blocks.items(), desc="calibrating blocks", shown=progress)
        for index, (name, block) in enumerate(bar):
            own, later = [call[index] for call in calls], _from(len(errors) * descent.steps, log)
            error = calibrate_block(name, block, own, hidden, descent, init, later)
            if error is not None:
                errors.append(error)
                bar.set_postfix(error=f"{error.before:.3g} -> {error.after:.3g}")
    return errors


def _from(start: int, log: Log | None) -> Log | None:
    """The same log, whose steps count from another start."""
    return None if log is None else lambda step, loss, lr: log(start + step, loss, lr)


def calibrate_block(
    name: str,
    block: nn.Module,
    calls: list[Call],
    hidden: Hidden,
    descent: Descent,
    init: str | None,
    log: Log | None = None,
) -> BlockError | None:
    """Calibrate one decoder layer, and turn `hidden` from its inputs to its outputs.

    Returns:
        Its error; None, and nothing is changed in it, if it does not hold the adapter.

    Raises:
        FloatingPointError: if the error turns NaN or infinite. The layer is then as it was before.
    """
    adapter_name = descent.adapter_name
    layers = {
        part: module
        for part, module in block.named_modules()
        if isinstance(module, DLQATLayer) and adapter_name in module.specs
    }
    weighted = init in WEIGHTED
    loss = BlockLoss(block, calls, hidden)
    with InputMoments(layers if weighted else {}) as moments:
        loss.advance_teacher(moments)
    error = None
    if layers:
        tensors = descent.tensors(layers.values())
        with only_these_train(block, tensors):
            outcome = keep_lowest(
                loss,
                tensors,
                (lambda: fit_to_inputs(layers, moments.means(), adapter_name, str(init))) if weighted else None,
                (lambda: descent.run(loss, layers.values(), log)) if descent.steps else None,
            )
        error = BlockError(name, *outcome)
    loss.advance_student()
    return error


class BlockLoss:
    """The mean squared error of one decoder layer's output, as `descent.Loss` has it.

    Args:
        block: the decoder layer.
        calls: its arguments beside the hidden states, by batch.
        hidden: its inputs; the teacher's are its outputs from `advance_teacher` on.
    """

    def __init__(self, block: nn.Module, calls: list[Call], hidden: Hidden) -> None:
        self._block, self._calls, self._hidden = block, calls, hidden

    @torch.no_grad()
    def mean(self) -> float:
        """Mean squared error over all batches and processes."""
        sums = torch.stack([torch.stack(self._squared_error(i)).double() for i in range(len(self._calls))])
        squares, count = mean_over_processes(sums.sum(0))
        return (squares / count).item()

    def at_step(self, step: int) -> torch.Tensor:
        """Of one batch; batches are taken in turn."""
        squares, count = self._squared_error(step % len(self._calls))
        # Weighted by this process's share of the positions, so that the mean over processes is that over positions.
        return squares / mean_over_processes(count)

    def advance_teacher(self, moments: InputMoments) -> None:
        """Replace the teacher's inputs by its outputs; `moments` sees the positions that count."""
        with adapters_disabled(self._block):
            self._advance(self._hidden.teacher, moments)

    def advance_student(self) -> None:
        """Replace the student's inputs by its outputs."""
        self._advance(self._hidden.student)

    @torch.no_grad()
    def _advance(self, states: HiddenStates, moments: InputMoments | None = None) -> None:
        for index in range(len(self._calls)):
            if moments is not None:
                moments.mask = self._hidden.counted[index]
            states[index] = self._run(states, index)

    def _run(self, states: HiddenStates, index: int) -> torch.Tensor:
        device = device_of(self._block)
        args, kwargs = send_to_device(self._calls[index], device)
        output = self._block(states[index].to(device), *args, **kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def _squared_error(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over the counted positions of a batch, and how many numbers that are."""
        output = self._run(self._hidden.student, index).float()
        target, counted = self._hidden.teacher[index].to(output), self._hidden.counted[index]
        if counted is not None:  # selected, not multiplied by 0: a row of padding may hold NaN
            counted = counted.to(output.device)
            output, target = output[counted], target[counted]
        return (output - target).square().sum(), output.new_tensor(max(1, output.numel()))
