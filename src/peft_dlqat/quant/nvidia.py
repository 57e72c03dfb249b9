"""The weight's arithmetic on an NVIDIA GPU: the same three functions as the reference's, by Triton's kernels.

For few tokens the GPU waits for the host, so nothing here launches what a kernel can do on its way.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_kernels as kernels
from .fixed_point import ALL_STORAGES, STORAGES, Storage, as_rows
from .grid import Grid
from .quantizer import Quantizer, ship, store

# Of a tile: rows, columns, and the warps that share it.
_TILE = {"quantize": (32, 128, 8), "weight_grads": (32, 64, 4)}  # the fastest of seven on an H100, about
_SCALE_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def probe(device: str) -> None:
    """Compile a kernel and run it; raises whatever Triton does where it cannot."""
    grid = Grid(2, 16, "none", torch.bfloat16)
    ones = torch.ones(16, 16, device=device)
    step = ones[:, :1].contiguous()
    quantized(ones.bfloat16(), Quantizer(grid, 1.0, ones[:1], step, step, None, step, None), torch.bfloat16)


def supports(weight: torch.Tensor, quantizer: Quantizer) -> bool:
    """Whether the kernels can do it: float32 arithmetic, groups that tile evenly, the storage that they decode."""
    size, plain = quantizer.grid.group_size, type(ALL_STORAGES[quantizer.storage]) is Storage
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
    g = g.contiguous()
    factors = "A" in wanted or "B" in wanted
    tiles, arguments = _arguments("weight_grads", weight, quantizer)
    n_out, n_groups = quantizer.scale.shape
    parts = max(1, tiles[0] // n_groups)  # tiles that a group spans
    # A kernel's tiles may be wider than the weight, never its groups.
    sums: dict[str, torch.Tensor] = {
        name: torch.empty((n_out, n_groups, parts), dtype=torch.float32, device=g.device)
        for name in ("scale", "zero", "step", "rounding_zero")
        if name in wanted
    }
    with _device_of(weight):
        kernels.weight_grads[tiles](
            g=g,
            of_scale=sums.get("scale"),
            of_zero=sums.get("zero"),
            of_step=sums.get("step"),
            of_rounding_zero=sums.get("rounding_zero"),
            FACTORS=factors,
            **arguments,
        )
    grads: dict[str, torch.Tensor] = {
        name: value.squeeze(-1) if parts == 1 else value.sum(-1) for name, value in sums.items()
    }
    if "A" in wanted:
        grads["A"] = (quantizer.B.to(g.dtype).t() @ g).to(quantizer.A.dtype)
    if "B" in wanted:
        grads["B"] = (g @ quantizer.A.to(g.dtype).t()).to(quantizer.B.dtype)
    return grads


def _quantize(weight: torch.Tensor, quantizer: Quantizer, result: torch.Tensor) -> torch.Tensor:
    """Fill `result` [out, in] with w_hat or, if it is int8, with codes."""
    tiles, arguments = _arguments("quantize", weight, quantizer)
    with _device_of(weight):
        kernels.quantize[tiles](
            result=result,
            result_row_stride=result.stride(0),
            result_column_stride=result.stride(1),
            CODES_ONLY=result.dtype == torch.int8,
            **arguments,
        )
    return result


def _arguments(kernel: str, weight: torch.Tensor, quantizer: Quantizer) -> tuple[tuple[int, int], dict[str, Any]]:
    """How many tiles, and what both kernels take."""
    grid, storage, (n_out, n_in) = quantizer.grid, quantizer.storage, quantizer.shape
    if storage != "full" and weight.is_floating_point():
        weight = store(weight, quantizer)
    scale, zero = ship(quantizer.scale, quantizer.zero, grid) if grid.k_quant else (quantizer.scale, quantizer.zero)
    tiles, constants = _constants(
        _TILE[kernel], grid, n_out, n_in, quantizer.A.shape[0], quantizer.update_in_steps, storage
    )
    return tiles, {
        "weight": weight,
        "A": quantizer.A.contiguous(),
        "B": quantizer.B.contiguous(),
        "step": quantizer.step.contiguous(),
        "rounding_zero": _contiguous(quantizer.rounding_zero),
        "scale": scale.contiguous(),
        "zero": _contiguous(zero),
        "n_out": n_out,
        "n_in": n_in,
        "row_stride": weight.stride(0),
        "column_stride": weight.stride(1),
        "scaling": float(quantizer.scaling),
        **constants,
    }


@cache
def _constants(
    tile: tuple[int, int, int], grid: Grid, n_out: int, n_in: int, rank: int, update_in_steps: bool, storage: str
) -> tuple[tuple[int, int], dict[str, Any]]:
    rows, columns, warps = tile
    columns = max(16, min(columns, triton.next_power_of_2(n_in)))
    constants = {
        "RANK": rank,
        "BITS": grid.bits,
        "GROUP_SIZE": grid.group_size,
        "ZERO_POINT": grid.zero_point,
        "SCALE_DTYPE": None if grid.k_quant else _SCALE_DTYPES[grid.scale_dtype],
        "UPDATE_IN_STEPS": update_in_steps,
        "STORED_BITS": STORAGES[storage].bits,
        "ROWS": rows,
        "COLUMNS": columns,
        "GROUPS": 1 if grid.group_size == n_in else max(1, columns // grid.group_size),
        "num_warps": warps,
        "enable_fp_fusion": False,
    }
    return (-(-n_in // columns), -(-n_out // rows)), constants


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _device_of(weight: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if not weight.is_cuda or weight.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(weight.device)
