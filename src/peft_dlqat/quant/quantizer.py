"""From latent weight to codes and back: the arithmetic that training, merge and export share, for every method.

    unrounded = (W0 + update) / step + rounding_zero        `unrounded_codes`
    codes     = clip(round(unrounded), qmin, qmax)          `round_codes`
    S, Z      = scale and zero, rounded as files keep them  `ship`
    w_hat     = S * (codes - z)  or  S * (codes - qmin) + M `dequantize`

with update = scaling * BA. A method (see `methods`) says what the four of a `Quantizer` are; for DL-QAT (arXiv
2504.09223, eq. 3 and 4) step = s and scale = m * s. The magnitude is multiplied into the scale *first*. That makes the
trained, the merged and the exported weight equal to the bit: `m * (S * codes)` and `(m * S) * codes` are not.

`naive` is the same in a page. Here everything is elementwise on tensors grouped as [out, n_groups, group_size], and
steps after the first work in place: on a CPU, what is in the cache already costs little, and a new tensor much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .fixed_point import ALL_STORAGES
from .grid import Grid
from .in_file import file_storage

# Weights in a piece of rows: its temporaries fit a CPU's cache, which saves more time than anything else does.
_PIECE = 2**21
_PIECE_ON_GPU = 2**26  # a GPU wants few large launches
# What a quantizer has a row of for each row of the weight.
_BY_ROW = ("B", "step", "rounding_zero", "scale", "zero")


@dataclass(frozen=True)
class Quantizer:
    """The way of one weight [out, in] into its grid and out of it.

    The zeros are integers z for `zero_point="integer"` (real-valued while calibrating, and rounded straight-through),
    offsets b for "float", and None for "none".

    Attributes:
        grid: the format of the codes.
        scaling: lora_alpha / r.
        A: low-rank factor [r, in]; r = 0 where the method has no update inside the quantizer.
        B: low-rank factor [out, r].
        step: by which the latent weight is divided [out, n_groups].
        rounding_zero: the zero with which it is rounded, + z or - b [out, n_groups].
        scale: by which codes are multiplied [out, n_groups].
        zero: the zero with which they are decoded, - z or + b [out, n_groups].
        update_in_steps: BA is added to W0 / step, not to W0.
        storage: how W0 is kept (a key of `ALL_STORAGES`), in units of this very step and rounding zero.
    """

    grid: Grid
    scaling: float
    A: torch.Tensor
    B: torch.Tensor
    step: torch.Tensor
    rounding_zero: torch.Tensor | None
    scale: torch.Tensor
    zero: torch.Tensor | None
    update_in_steps: bool = False
    storage: str = "full"

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.B.shape[0], self.A.shape[1]


def piece_rows(in_features: int, device_type: str) -> int:
    """Rows in a piece."""
    return max(1, (_PIECE if device_type == "cpu" else _PIECE_ON_GPU) // in_features)


def pieces(weight: torch.Tensor, quantizer: Quantizer) -> Iterator[tuple[slice, torch.Tensor, Quantizer]]:
    """Some rows of the weight [out, in] at a time, and the quantizer of these.

    Codes that torch computes come by these pieces everywhere: a matrix product may round differently in another shape,
    and then a latent weight on the edge between two codes would fall to one in training and to the other at merge.
    """
    out_features, in_features = quantizer.shape
    count = piece_rows(in_features, weight.device.type)
    if count >= out_features:
        yield slice(0, out_features), weight, quantizer
        return
    for start in range(0, out_features, count):
        rows = slice(start, start + count)
        own = {name: value[rows] for name in _BY_ROW if (value := getattr(quantizer, name)) is not None}
        yield rows, weight[rows], replace(quantizer, **own)


def shipped_zero(zero: torch.Tensor | None, grid: Grid) -> torch.Tensor | None:
    """The zero as the forward uses it: a zero point is real-valued while calibrating, and rounded straight-through."""
    return zero.round() if zero is not None and grid.zero_point == "integer" else zero


def in_steps(
    weight: torch.Tensor, step: torch.Tensor, zero: torch.Tensor | None, grid: Grid, in_place: bool = False
) -> torch.Tensor:
    """A weight [out, in] in units of the grid, grouped: weight / step + z, or (weight - b) / step."""
    weight, step = grid.group(weight), step.unsqueeze(-1)
    if grid.zero_point == "float":
        assert zero is not None
        return (weight.sub_ if in_place else weight.sub)(zero.unsqueeze(-1)).div_(step)
    units = (weight.div_ if in_place else weight.div)(step)
    return units if zero is None else units.add_(zero.unsqueeze(-1))


def store(weight: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """W0 [out, in] packed as `quantizer.storage` says: uint8 [out, in * bits / 8]."""
    grid, storage = quantizer.grid, ALL_STORAGES[quantizer.storage]
    return torch.cat(
        [
            storage.encode(units.flatten(-2), round_codes(units, grid).flatten(-2), grid)
            for _, piece, own in pieces(weight, quantizer)
            for units in [in_steps(piece.float(), own.step, shipped_zero(own.rounding_zero, grid), grid)]
        ]
    )


def decode_stored(packed: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """W0, float32 [out, in], as far as what `store` packed still tells it."""
    grid, in_file = quantizer.grid, file_storage(quantizer.storage)
    if in_file is not None:
        decoded = packed.new_empty(quantizer.shape, dtype=torch.float32)
        for rows, piece, own in pieces(packed, quantizer):
            codes = grid.group(in_file.decode(piece, grid))
            decoded[rows] = dequantize(codes, *in_file.ship(piece, own.scale, own.zero, grid), grid, in_place=True)
        return decoded
    units = grid.group(ALL_STORAGES[quantizer.storage].decode(packed, grid))
    step, zero = quantizer.step.unsqueeze(-1), shipped_zero(quantizer.rounding_zero, grid)
    if zero is None:
        return units.mul_(step).flatten(-2)
    if grid.zero_point == "integer":
        return units.sub_(zero.unsqueeze(-1)).mul_(step).flatten(-2)
    return units.mul_(step).add_(zero.unsqueeze(-1)).flatten(-2)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """In which codes are chosen: float32, or float64 if W0 is."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def unrounded_codes(weight: torch.Tensor, quantizer: Quantizer, out: torch.Tensor | None = None) -> torch.Tensor:
    """The latent weight in units of the grid, [out, n_groups, group_size] in `compute_dtype`.

    Args:
        weight: W0 [out, in], any floating dtype; with a `quantizer.storage`, that or what [`store`] packed.
        quantizer: see [`Quantizer`].
        out: [out, in], contiguous, where they go.
    """
    dtype, grid, scaling = compute_dtype(weight), quantizer.grid, quantizer.scaling
    A, B, step = quantizer.A.to(dtype), quantizer.B.to(dtype), quantizer.step
    zero = shipped_zero(quantizer.rounding_zero, grid)
    with torch.autocast(weight.device.type, enabled=False):
        if quantizer.storage != "full":
            packed = store(weight, quantizer) if weight.is_floating_point() else weight
            update = grid.group(torch.mm(B, A, out=out).mul_(scaling))
            if not quantizer.update_in_steps:
                update.div_(step.unsqueeze(-1))
            return update.add_(grid.group(ALL_STORAGES[quantizer.storage].decode(packed, grid)))
        if quantizer.update_in_steps:
            units = in_steps(weight.to(dtype), step, zero, grid)
            return grid.group(torch.addmm(units.flatten(-2), B, A, alpha=scaling, out=out))
        latent = torch.addmm(weight.to(dtype), B, A, alpha=scaling, out=out)
        return in_steps(latent, step, zero, grid, in_place=True)


def round_codes(unrounded: torch.Tensor, grid: Grid, in_place: bool = False) -> torch.Tensor:
    """Round half to even, then clip to [qmin, qmax]."""
    return (unrounded.round_ if in_place else unrounded.round)().clamp_(grid.qmin, grid.qmax)


def ship(scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero as a file holds them, rounded to `grid.scale_dtype` or the integers of a K-quant.

    Returns:
        S = rnd(scale) and, by kind of zero, None, z, or M = rnd(b + qmin * S). M belongs to the *unsigned* code, which
        is what file formats hold; rounding b on signed codes would not give the same weight.
    """
    shipped = grid.round_scale(scale)
    if grid.zero_point == "float":
        assert zero is not None
        return shipped, grid.round_offset(zero + grid.qmin * shipped)
    return shipped, shipped_zero(zero, grid)


def shipped(weight: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The quantizer's scale and zero as `ship` returns them, or as the type of file that W0 came from has them.

    Args:
        weight: W0 [out, in] as it is kept, all rows of the quantizer.
        quantizer: see [`Quantizer`].
    """
    in_file = file_storage(quantizer.storage)
    if in_file is not None:
        return in_file.ship(weight, quantizer.scale, quantizer.zero, quantizer.grid)
    return ship(quantizer.scale, quantizer.zero, quantizer.grid)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid, in_place: bool = False
) -> torch.Tensor:
    """w_hat [out, in] from grouped codes [out, n_groups, group_size] and a shipped scale and zero.

    With a 16-bit scale every product is exact in float32, so any engine that dequantizes in float32 finds the same
    bits, with or without fused multiply-add.
    """
    scale, sub = scale.unsqueeze(-1), codes.sub_ if in_place else codes.sub
    if grid.zero_point == "float":
        assert zero is not None
        weight = sub(grid.qmin).mul_(scale).add_(zero.unsqueeze(-1))
    elif zero is not None:
        weight = sub(zero.unsqueeze(-1)).mul_(scale)
    else:
        weight = (codes.mul_ if in_place else codes.mul)(scale)
    return weight.flatten(-2)


def round_to_nearest(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, n_groups, group_size] of a weight [out, in], and the weight [out, in] that they stand for."""
    codes = round_codes(in_steps(weight, scale, shipped_zero(zero, grid), grid), grid)
    return codes, dequantize(codes, *ship(scale, zero, grid), grid)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as it ships. `dequantize()`, rounded to the input's dtype, is what training multiplies with.

    Attributes:
        codes: int8 [out, in] in [qmin, qmax].
        scale: S, float32 [out, n_groups], every value one that ships (`grid.round_scale` leaves it as it is).
        zero: None, the integer zero point z, or the offset M of the unsigned code; float32 [out, n_groups].
        grid: bits, group size, kind of zero, scale dtype.
        blocks: uint8 [out, row_bytes], the weight in the type of the file that W0 came from; None without one.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    grid: Grid
    blocks: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """w_hat, float32 [out, in]."""
        return dequantize(self.grid.group(self.codes).float(), self.scale, self.zero, self.grid)
