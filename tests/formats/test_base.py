"""What formats say of grids."""

from __future__ import annotations

import itertools
import re

import torch

from peft_dlqat.formats import FORMATS
from peft_dlqat.quant.grid import Grid


def test_remedies_are_held():
    """Whatever a remedy says is held; whatever is said to be held, some type holds."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for bits, size, zero, dtype in itertools.product(
        range(2, 9), (16, 32, 80, 256, -1), ("none", "integer", "float"), dtypes
    ):
        grid = Grid(bits, size, zero, dtype)
        for format in FORMATS.values():
            problem = format.problem(grid)
            assert bool(problem) is not format.holds(grid)
            if not problem:
                assert format.stored_as(grid)[1] >= bits
                continue
            for remedy in problem.partition("; use ")[2].split(" or "):
                changes = dict(re.findall(r"(\w+)='?(\w+)'?", remedy))
                assert changes, problem
                fixed = Grid(
                    int(changes.get("bits", bits)),
                    int(changes.get("group_size", size)),
                    changes.get("zero_point", zero),
                    getattr(torch, changes["scale_dtype"]) if "scale_dtype" in changes else dtype,
                )
                assert format.holds(fixed), problem
    (problem,) = {FORMATS["mlx"].problem(Grid(3, 16, "none", torch.float32, k_quant=True))}
    assert "group_size=32" in problem and "scale_dtype=" in problem, "a K-quant's groups do not change alone"
