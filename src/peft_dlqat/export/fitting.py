"""From the weights that were trained to those that a format holds: the same, an error, or on request the nearest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ..formats import Rule
from ..quant.fit import initialise
from ..quant.grid import Grid
from ..quant.quantizer import QuantizedWeight, round_to_nearest, ship
from .options import Options
from .source import Entry, Source


def check_held(source: Source, rule: Rule, lossy: bool) -> list[str]:
    """Whether the format holds every weight's grid, before anything is written.

    Returns:
        What is lost, with `lossy`.

    Raises:
        ValueError: naming what cannot be held and what to change, unless `lossy`.
    """
    problems: dict[str, list[str]] = {}
    for entry in source.entries:
        if entry.grid is not None and (problem := rule.problem(entry.grid, entry.out_in)):
            problems.setdefault(problem, []).append(entry.name)
    lines = [f"{problem} ({len(names)} weights: {names[0]}, ...)" for problem, names in problems.items()]
    if lines and not lossy:
        raise ValueError("; ".join(lines) + ", train on such a grid, or pass lossy=True to round again.")
    return lines


def refuse_conv1d(source: Source, rule: Rule, options: Options) -> None:
    """Refuse adapted Conv1D layers, whose weights the format's loaders keep as [in, out], with groups along out.

    Raises:
        ValueError: unless `options.lossy`; they are kept dense then.
    """
    names = [entry.name for entry in source.entries if entry.grid is not None and entry.transposed]
    if names and not options.lossy:
        raise ValueError(
            f"{names[0]} and {len(names) - 1} more weights belong to Conv1D layers, which {rule.name} cannot pack; "
            "export the model as 'gguf' or 'dense', or pass lossy=True to keep these layers dense."
        )
    options.unpacked = set(names)


def fitted(
    source: Source, rule: Rule, options: Options, names: Iterable[str] | None = None
) -> Iterator[tuple[Entry, torch.Tensor | QuantizedWeight]]:
    """The source's tensors, or some of them, every quantized weight one that the format holds.

    Raises:
        ValueError: for a scale or offset that the format's dtype does not hold, unless `options.lossy`.
    """
    for entry, value in source.read(names):
        if isinstance(value, QuantizedWeight):
            if entry.name in options.unpacked:
                options.kept_dense.append(entry.name)
                value = value.dequantize()
            else:
                value = _fit(entry.name, value, rule, options)
            if isinstance(value, QuantizedWeight):
                options.grids[entry.name] = value.grid
        yield entry, value


def _fit(name: str, weight: QuantizedWeight, rule: Rule, options: Options) -> torch.Tensor | QuantizedWeight:
    grid = _held_or_nearest(weight.grid, rule, (weight.codes.shape[0], weight.codes.shape[1]))
    if grid is None:
        options.kept_dense.append(name)
        return weight.dequantize()
    if grid != weight.grid:
        weight = requantized(weight, grid)
    weight = _without_dead_scales(weight)
    dtype = rule.scale_dtype(weight.grid)
    rounded = weight.scale.to(dtype).float()
    offset = weight.zero if weight.grid.zero_point == "float" else None
    exact = torch.equal(rounded, weight.scale) and (offset is None or torch.equal(offset.to(dtype).float(), offset))
    if exact:
        return weight
    if not options.lossy:
        worst = weight.scale[rounded != weight.scale] if offset is None else offset[offset.to(dtype).float() != offset]
        found = worst[0].item() if worst.numel() else weight.scale[rounded != weight.scale][0].item()
        raise ValueError(
            f"{name}: a scale or offset of {found:.6g} has no exact {str(dtype).removeprefix('torch.')}, in which "
            f"{rule.name} keeps it; train with scale_dtype='float16', or pass lossy=True to round it."
        )
    options.rescaled.append(name)
    zero = weight.zero if offset is None else offset.to(dtype).float()
    check_finite(f"{name}, a scale", weight.scale, rounded, dtype, "use another format")
    if offset is not None and zero is not None:
        check_finite(f"{name}, an offset", offset, zero, dtype, "use another format")
    return replace(weight, scale=rounded, zero=zero)


def check_finite(name: str, value: torch.Tensor, written: torch.Tensor, dtype: torch.dtype | str, remedy: str) -> None:
    """Refuse a number that is too large for the dtype in which it is written.

    Raises:
        ValueError: if something finite would become infinite or NaN.
    """
    lost = value.isfinite() & ~written.isfinite()
    if lost.any():
        raise ValueError(
            f"{name}: {value[lost][0].item():.6g} is too large for {str(dtype).removeprefix('torch.')}, in which it "
            f"would be written; {remedy}."
        )


def _without_dead_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """A group of zeros is zero by any scale: 1 fits every dtype. In a K-quant, others hang on it."""
    if weight.grid.zero_point == "float" or weight.grid.k_quant:
        return weight
    codes = weight.grid.group(weight.codes)
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    dead = (codes == zero.unsqueeze(-1)).all(-1)
    return replace(weight, scale=torch.where(dead, 1.0, weight.scale)) if dead.any() else weight


def fitting_grid(entry: Entry, rule: Rule) -> Grid | None:
    """The grid on which `fitted` gives an adapted weight; None where the format holds none like it."""
    assert entry.grid is not None
    return _held_or_nearest(entry.grid, rule, entry.out_in)


def _held_or_nearest(grid: Grid, rule: Rule, shape: tuple[int, int]) -> Grid | None:
    return nearest_grid(grid, rule, shape) if rule.problem(grid, shape) else grid


def nearest_grid(grid: Grid, rule: Rule, shape: tuple[int, int]) -> Grid | None:
    """The grid most like a given one that the format holds: rather more bits than fewer, rather no larger groups."""
    groups = [grid.group_size, *(size for size in (128, 64, 32) if size < grid.group_size), 32]
    groups = [size for size in groups if shape[1] % size == 0]
    for bits in (*range(grid.bits, 9), *range(grid.bits - 1, 1, -1)):
        for size in groups:
            for zero_point in (grid.zero_point, "integer", "none"):
                for dtype in (grid.scale_dtype, torch.float16):
                    candidate = Grid(bits, size, zero_point, dtype)  # type: ignore[arg-type]
                    if not rule.problem(candidate, shape):
                        return candidate
    return None


def requantized(weight: QuantizedWeight, grid: Grid) -> QuantizedWeight:
    """The weight rounded once more, onto another grid."""
    dense = weight.dequantize()
    scale, zero = initialise(dense, grid, "mse")
    codes, _ = round_to_nearest(dense, scale, zero, grid)
    return QuantizedWeight(codes.flatten(-2).to(torch.int8), *ship(scale, zero, grid), grid)
