"""Compile the Triton kernels for a real card, without one, just as `quant.nvidia` launches them.

    python tests/scripts/compile_kernels.py [--arch 90]

Prints a line for each compiled kernel: bytes of machine code and, of a thread, registers, bytes spilled to the stack,
and fused multiply-adds. The interpreter, in which tests run the kernels, takes much that the compiler does not.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_dlqat.quant import nvidia as gpu
from peft_dlqat.quant import triton_kernels as kernels
from peft_dlqat.quant.fixed_point import STORAGES
from peft_dlqat.quant.grid import ZERO_POINTS, Grid, ZeroPoint
from peft_dlqat.quant.quantizer import Quantizer

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def in_order(ptx: str) -> bool:
    """Whether every chain of fused multiply-adds takes its row of B, which shared memory has, in ascending order."""
    addresses = {
        register.strip(): (base, int(offset or 0) + 4 * i)
        for registers, base, offset in re.findall(r"ld\.shared\.v4\.b32\s+{(.*?)}, \[(%r\d+)(?:\+(\d+))?\]", ptx)
        for i, register in enumerate(registers.split(","))
    }
    chains: dict[str, list[tuple[str, int]]] = {}  # by the register of their sum
    for total, a, b, before in re.findall(r"fma\.rn\.f32\s+(\S+), (\S+), (\S+), (\S+);", ptx):
        if a in addresses and b in addresses:
            chains[total] = [*chains.pop(before, []), addresses[a]]
    ranks = [
        [(base, start + 4 * k) for k in range(len(chain))] for chain in chains.values() for base, start in chain[:1]
    ]
    return bool(ranks) and list(chains.values()) == ranks


class Compiled:
    """Takes the place of a kernel: where that would be launched, it is compiled."""

    def __init__(self, kernel: triton.JITFunction, target: GPUTarget) -> None:
        self.kernel, self.target = kernel, target

    def __getitem__(self, launch_grid: tuple[int, ...]) -> Compiled:
        return self

    def __call__(self, enable_fp_fusion: bool, num_warps: int = 4, **arguments: Any) -> None:
        tile = dict(arguments)
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes = {}
        for parameter in self.kernel.params:
            name, value = parameter.name, arguments.pop(parameter.name)
            # As Triton specializes: a 1 is a constant, None another, and what can be divided by 16 is known to.
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, torch.Tensor) or (signature[name] == "i32" and value % 16 == 0):
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        assert not arguments, f"{self.kernel.__name__} has no parameters {sorted(arguments)}"
        source = ASTSource(self.kernel, signature, constants, attributes)
        found = triton.compile(source, self.target, {"enable_fp_fusion": enable_fp_fusion, "num_warps": num_warps})
        code = found.asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code)
            file.flush()
            usage = subprocess.run(
                [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack = (re.search(rf"{what}:(\d+)", usage)[1] for what in ("REG", "STACK"))
        ptx = found.asm["ptx"]
        # Of a thread, for each of its weights: the low-rank update has one a rank, of a block; a division has two.
        fused = len(re.findall(r"fma\.rn\.f32", ptx))
        expected = tile["ROWS"] * tile["COLUMNS"] // (32 * num_warps) * (16 + 2)
        if not in_order(ptx):
            raise SystemExit(f"{self.kernel.__name__} does not add the ranks in their order")
        if re.search(r"div\.(full|approx)", ptx) or re.search(r"cvt\.rz\.b?f16", ptx):
            raise SystemExit(f"{self.kernel.__name__} divides or rounds otherwise than torch")
        print(
            f"{self.kernel.__name__}: {len(code)} bytes, {registers} registers, {stack} bytes of stack, {fused} fused "
            f"of {expected}, {found.metadata.shared} bytes shared"
        )


def quantizer(n_out: int, n_in: int, r: int, grid: Grid, storage: str) -> Quantizer:
    groups = torch.ones(n_out, n_in // grid.group_size)
    zero = None if grid.zero_point == "none" else groups
    return Quantizer(grid, 1.0, torch.ones(r, n_in), torch.ones(n_out, r), groups, zero, groups, zero, False, storage)


def compile_all(
    dtypes: list[torch.dtype], zero_points: list[ZeroPoint], bits: int, group_size: int, r: int, n_out: int, n_in: int
) -> None:
    """All kernels for weights in these dtypes, in full and packed."""
    for dtype, zero_point in itertools.product(dtypes, zero_points):
        grid = Grid(bits, group_size, zero_point, torch.bfloat16)
        for storage in ("full", "int8", "int4"):
            if storage != "full" and dtype != dtypes[0]:
                continue
            weight = torch.ones(n_out, n_in, dtype=dtype)
            if storage != "full":
                weight = torch.ones(n_out, n_in * STORAGES[storage].bits // 8, dtype=torch.uint8)
            own = quantizer(n_out, n_in, r, grid, storage)
            print(f"{zero_point}, {weight.dtype}, {storage}:")
            gpu.quantized(weight, own, dtype)
            gpu.codes(weight, own)
            g = torch.ones(n_out, n_in, dtype=dtype)
            gpu.weight_grads(g, {"A", "B", "scale"}, weight, own)
            calibrated = {"step", "scale"} | (set() if zero_point == "none" else {"rounding_zero", "zero"})
            gpu.weight_grads(g, {"A", "B"} | calibrated, weight, own)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability without its point")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--zero-points", nargs="+", choices=ZERO_POINTS, default=ZERO_POINTS)
    args = parser.parse_args()
    target = GPUTarget("cuda", args.arch, 32)
    for name in ("quantize", "weight_grads"):
        setattr(kernels, name, Compiled(getattr(kernels, name), target))
    compile_all([torch.bfloat16, torch.float32], args.zero_points, args.bits, args.group_size, args.rank, 256, 4096)
