"""Watching for trouble: how each layer uses its grid.

DL-QAT fails in three known ways: the codes collapse (most clipped, or all on one level), the magnitude explodes,
or the codes oscillate because s or b was left trainable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..layer import DLQATLayer, adapter_layers
from ..model import check_what_was_loaded
from ..quant.quantizer import dequantize, pieces, round_codes, shipped, unrounded_codes

# Beyond these a layer is called broken; a sound 2-bit layer clips about a tenth of its weights and keeps m near 1.
_MOST_CLIPPED = 0.5
_FEWEST_LEVELS = 1.5
_LARGEST_MAGNITUDE = 10.0


@dataclass(frozen=True)
class LayerReport:
    """How one layer uses its grid.

    Attributes:
        name: module name.
        bits: width of a code.
        clipped: share of the weights that round to a code outside the grid and are clipped to its edge.
        levels: distinct codes in a group, averaged over the groups; at most 2**bits.
        magnitude_min: smallest m.
        magnitude_max: largest m.
        error: ||w_hat - W0|| / ||W0||, the quantization (and fine-tuning) error against the original weight.
        problem: what is wrong and what to do, or "".
    """

    name: str
    bits: int
    clipped: float
    levels: float
    magnitude_min: float
    magnitude_max: float
    error: float
    problem: str


@dataclass(frozen=True)
class GridReport:
    """How all layers use their grids; `print` it for a table.

    Attributes:
        layers: one [`LayerReport`] a layer.
    """

    layers: tuple[LayerReport, ...]

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line a layer."""
        return [f"{row.name}: {row.problem}" for row in self.layers if row.problem]

    def summary(self) -> dict[str, float]:
        """Figures for a log: means over the layers, extremes of m."""
        count = len(self.layers)
        return {
            "grid/clipped": sum(row.clipped for row in self.layers) / count,
            "grid/levels": sum(row.levels for row in self.layers) / count,
            "grid/magnitude_min": min(row.magnitude_min for row in self.layers),
            "grid/magnitude_max": max(row.magnitude_max for row in self.layers),
            "grid/error": sum(row.error for row in self.layers) / count,
        }

    def __str__(self) -> str:
        """A table."""
        width = max(len(row.name) for row in self.layers)
        lines = [f"{'layer':<{width}}  bits  clipped  levels  m min   m max   error"]
        lines += [
            f"{row.name:<{width}}  {row.bits:>4}  {row.clipped:>6.1%}  {row.levels:>6.2f}  {row.magnitude_min:>5.3f}  "
            f"{row.magnitude_max:>6.3f}  {row.error:>6.3f}  {row.problem}"
            for row in self.layers
        ]
        return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def grid_report(model: nn.Module, adapter_name: str | None = None) -> GridReport:
    """Examine every layer's grid: clipping, levels used, magnitudes and quantization error.

    Args:
        model: a model with a DL-QAT adapter.
        adapter_name: defaults to the active adapter.

    Returns:
        A [`GridReport`].

    Raises:
        ValueError: if the model has no such adapter, or several are active and none is named.
    """
    check_what_was_loaded(model)
    adapter_name, layers = adapter_layers(model, adapter_name)
    return GridReport(tuple(_examine(name, layer, adapter_name) for name, layer in layers.items()))


def _examine(name: str, layer: DLQATLayer, adapter_name: str) -> LayerReport:
    grid, (scale, zero) = layer.specs[adapter_name].grid, layer.scales_and_zeros(adapter_name)
    weight, quantizer = layer.frozen.original(), layer.quantizer(adapter_name)
    kept = weight if layer.frozen.in_file is None else layer.frozen.as_kept()
    clipped, steps, squares = 0, 0, 0.0
    for rows, piece, own in pieces(kept, quantizer):
        unrounded = unrounded_codes(piece, own)
        codes = round_codes(unrounded, grid)
        clipped += int((unrounded.round() != codes).sum())
        steps += int((codes.sort(-1).values.diff() != 0).sum())
        w_hat = dequantize(codes, *shipped(piece, own), grid)
        squares += (w_hat - weight[rows].float()).norm().item() ** 2
    share, levels = clipped / weight.numel(), 1 + steps / scale.numel()
    magnitude = (quantizer.scale / scale)[scale != 0]
    # An all-zero weight has no relative error.
    error = math.sqrt(squares) / max(torch.linalg.vector_norm(weight, dtype=torch.float32).item(), 1e-30)
    smallest, largest = magnitude.min().item(), magnitude.max().item()

    problem = ""
    if not math.isfinite(error) or max(abs(smallest), abs(largest)) > _LARGEST_MAGNITUDE:
        problem = "the magnitude has exploded; lower the learning rate or clip gradients"
    elif share > _MOST_CLIPPED:
        problem = "most codes are clipped; lower the learning rate, or calibrate longer"
    elif levels < _FEWEST_LEVELS and weight.any():
        problem = "the codes have collapsed onto one level; lower the calibration's lr, or use smaller groups"
    elif scale.requires_grad or (zero is not None and zero.requires_grad):
        problem = "scale or zero is trainable, and the codes will oscillate; freeze them, as `calibrate` does"
    return LayerReport(name, grid.bits, share, levels, smallest, largest, error, problem)
