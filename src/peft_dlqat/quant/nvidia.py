"""The weight's arithmetic on an NVIDIA GPU: the same three functions as the reference's, by Triton's kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton

from . import triton_kernels as kernels
from .fixed_point import STORAGES, Storage, as_rows
from .quantizer import Quantizer, ship, shipped_zero, store

_ROWS, _COLUMNS = 32, 128  # of a tile
_WARPS = 8


def supports(weight: torch.Tensor, quantizer: Quantizer) -> bool:
    """Whether the kernels can do it: float32 arithmetic, groups that tile evenly, the storage that they decode."""
    size, plain = quantizer.grid.group_size, type(STORAGES[quantizer.storage]) is Storage
    return weight.dtype != torch.float64 and (size & (size - 1) == 0 or size == quantizer.A.shape[1]) and plain


def codes(weight: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """As the reference's."""
    result = torch.empty(quantizer.shape, dtype=torch.int8, device=weight.device)
    return _quantize(weight, quantizer, result)


def quantized(
    weight: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype, fan_in_fan_out: bool = False
) -> torch.Tensor:
    """As the reference's; in memory transposed where the base layer has it so, which needs it contiguous."""
    n_out, n_in = quantizer.shape
    if fan_in_fan_out:
        result = torch.empty((n_in, n_out), dtype=dtype, device=weight.device).t()
    else:
        result = torch.empty((n_out, n_in), dtype=dtype, device=weight.device)
    return _quantize(as_rows(weight, fan_in_fan_out), quantizer, result)


def weight_grads(
    g: torch.Tensor, wanted: set[str], weight: torch.Tensor, quantizer: Quantizer
) -> dict[str, torch.Tensor]:
    """As the reference's; dL/dA and dL/dB are products in the dtype of g, as LoRA's are."""
    grid, scaling = quantizer.grid, quantizer.scaling
    scale, zero = ship(quantizer.scale, quantizer.zero, grid)
    slope = scale if quantizer.update_in_steps else scale / quantizer.step
    factors = bool(wanted & {"A", "B"})
    arguments, constants = _arguments(weight, quantizer)
    n_out, n_groups = quantizer.scale.shape
    tiles = (triton.cdiv(g.shape[1], constants["COLUMNS"]), triton.cdiv(n_out, _ROWS))
    n_sums = max(n_groups, tiles[0])
    sums = torch.empty((4, n_out, n_sums), dtype=torch.float32, device=weight.device)
    g = g.contiguous()
    with torch.cuda.device_of(weight):
        kernels.weight_grads[tiles](
            g=g,
            zero=_or_any(zero, arguments["step"]),
            slope=slope.float().contiguous(),
            sums=sums,
            n_sums=n_sums,
            **arguments,
            **constants,
            FACTORS=factors,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    of_all, of_clipped, of_codes, of_latent = sums.unflatten(-1, (n_groups, -1)).sum(-1)
    # Where nothing is clipped this is `of_all` to the bit, and the gradients of the two zeros cancel as they should.
    of_inside = of_all - of_clipped
    integer = grid.zero_point == "integer"
    grads: dict[str, torch.Tensor] = {}
    if "scale" in wanted:
        grads["scale"] = of_codes
    if "zero" in wanted:
        grads["zero"] = -scale * of_all if integer else of_all
    if "rounding_zero" in wanted:
        grads["rounding_zero"] = of_inside * (scale if integer else -scale / quantizer.step)
    if "step" in wanted:
        grads["step"] = of_latent * (-scale / quantizer.step)
    if "A" in wanted:
        grads["A"] = (quantizer.B.to(g.dtype).t() @ g).to(quantizer.A.dtype) * scaling
    if "B" in wanted:
        grads["B"] = (g @ quantizer.A.to(g.dtype).t()).to(quantizer.B.dtype) * scaling
    return grads


def _quantize(weight: torch.Tensor, quantizer: Quantizer, result: torch.Tensor) -> torch.Tensor:
    """Fill `result` [out, in] with w_hat or, if it is int8, with codes."""
    arguments, constants = _arguments(weight, quantizer)
    scale, zero = ship(quantizer.scale, quantizer.zero, quantizer.grid)
    tiles = (triton.cdiv(result.shape[1], constants["COLUMNS"]), triton.cdiv(result.shape[0], _ROWS))
    with torch.cuda.device_of(weight):
        kernels.quantize[tiles](
            scale=scale.float().contiguous(),
            zero=_or_any(zero, arguments["step"]),
            result=result,
            result_row_stride=result.stride(0),
            result_column_stride=result.stride(1),
            **arguments,
            **constants,
            CODES_ONLY=result.dtype == torch.int8,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return result


def _arguments(weight: torch.Tensor, quantizer: Quantizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both kernels take, tensors and numbers, and constants."""
    grid, stored_bits = quantizer.grid, STORAGES[quantizer.storage].bits
    if stored_bits and weight.is_floating_point():
        weight = store(weight, quantizer)
    n_out, n_in = quantizer.shape
    step = quantizer.step.float().contiguous()
    columns = max(16, min(_COLUMNS, triton.next_power_of_2(n_in)))
    n_groups = n_in // grid.group_size
    arguments = {
        "weight": weight,
        "A": quantizer.A.float().contiguous(),
        "B": quantizer.B.float().contiguous(),
        "step": step,
        "rounding_zero": _or_any(shipped_zero(quantizer.rounding_zero, grid), step),
        "n_out": n_out,
        "n_in": n_in,
        "r": quantizer.A.shape[0],
        "n_groups": n_groups,
        "group_size": grid.group_size,
        "row_stride": weight.stride(0),
        "column_stride": weight.stride(1),
        "scaling": float(quantizer.scaling),
    }
    constants = {
        "BITS": grid.bits,
        "ZERO_POINT": grid.zero_point,
        "UPDATE_IN_STEPS": quantizer.update_in_steps,
        "STORED_BITS": stored_bits,
        "ROWS": _ROWS,
        "COLUMNS": columns,
        "GROUPS": 1 if n_groups == 1 else max(1, columns // grid.group_size),
    }
    return arguments, constants


def _or_any(zero: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """The zero, or, where the grid has none and nobody reads it, any tensor."""
    return other if zero is None else zero.float().contiguous()
