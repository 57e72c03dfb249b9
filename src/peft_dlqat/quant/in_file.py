"""W0 as a quantized file has it: the file's own numbers, whose codes are the start and whose scales and zeros stay.

A kind of tensor that files have is one object in `FILE_STORAGES`, such as those of `ggml`, or `affine`. It says of the
bytes of some rows what they mean, and writes such bytes again. So an untrained adapter gives the file back, byte for
byte: nothing is found anew that the file says.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch

from .fixed_point import FILE_STORAGES, Storage
from .grid import Grid

# What a group is divided by whose scale is 0: no update moves its codes, and it gets no gradient.
_NO_STEP = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class FileStorage(Storage):
    """A kind of quantized tensors in files.

    W0 [out, in] lies in memory as uint8 [out, row_bytes], in whole groups. Each method is told the grid of its codes.
    Scales may be negative or 0 here, whatever the kind of zero.

    Attributes:
        name: of the kind.
    """

    name: str = field(default="", kw_only=True)

    @abstractmethod
    def scales_and_zeros(self, packed: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
        """s, and z or b or None [rows, n_groups], float32, of the bytes of some rows."""

    @abstractmethod
    def ship(
        self, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `quantizer.ship`, rounded to what the type holds beside the numbers that these rows have.

        The file's own scale and zero come back as they are, to the bit.
        """

    @abstractmethod
    def write(
        self, packed: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> torch.Tensor:
        """The bytes of a weight, uint8 [rows, row_bytes].

        Args:
            packed: W0's own.
            codes: int8 [rows, in].
            scale: [rows, n_groups], as `ship` takes it.
            zero: as `ship` takes it.
            grid: of the codes.
        """

    def encode(self, units: torch.Tensor, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Refuse a weight that is not the file's: it has no bytes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the frozen weight is not in {self.name} as its file has it, but was replaced by another; open the file "
            "again by load_quantized."
        )

    def step(self, scale: torch.Tensor) -> torch.Tensor:
        """What a latent weight is divided by: s, or where that is 0 so much that the codes stay."""
        return torch.where(scale == 0, _NO_STEP, scale)


def file_storage(name: str) -> FileStorage | None:
    """The kind of tensors of this name; None for the storages that are of no file."""
    return FILE_STORAGES.get(name)


def offset_of(M: torch.Tensor, s: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The offset b of a file's scale s and offset M of the unsigned code, as near as float32 has it."""
    return M - grid.qmin * s


def moved_offset(
    M: torch.Tensor, s: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """The unsigned code's offset for another b and scale: M itself where nothing has moved.

    float32 need not have an offset b that leads back to M.

    Args:
        M: the file's.
        s: the file's.
        zero: the b that is wanted.
        scale: the scale that ships.
        grid: of the codes.
    """
    way = (zero + grid.qmin * scale) - (offset_of(M, s, grid) + grid.qmin * s)
    return torch.where(way == 0, M, M + way)
