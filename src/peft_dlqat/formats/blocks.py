"""What a block type of GGUF is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..quant.grid import Grid

# What a packer takes: codes int8 [out, in] in [qmin, qmax]; the shipped scale S, and None, z or M, [out, n_groups].
Packer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Grid], np.ndarray]


@dataclass(frozen=True)
class BlockType:
    """A way of GGUF to store a weight.

    Attributes:
        name: its name in `gguf.GGMLQuantizationType`.
        block: weights in a block; must divide in_features.
        bits_per_weight: stored bits a weight.
        holds: whether every weight of a grid is one of the type's, where float16 holds the scales (and offsets).
        pack: (codes, scale, zero, grid) -> bytes, uint8 [out, in * bits_per_weight / 8].
    """

    name: str
    block: int
    bits_per_weight: float
    holds: Callable[[Grid], bool]
    pack: Packer
