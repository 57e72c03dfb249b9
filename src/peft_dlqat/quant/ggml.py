"""GGML's block types, as GGUF files have them, both ways: what the bytes of a block mean, and the bytes of numbers.

A row is a sequence of blocks of 32 or 256 weights, each with float16 numbers d (and m, or dmin) beside the codes u:

    Q4_0, Q5_0, Q8_0      w = d * (u + qmin)
    Q4_1, Q5_1            w = d * u + m
    Q2_K, Q4_K, Q5_K      w = d * sc * u - dmin * mn          sc, mn: integers, one a group
    Q3_K, Q6_K            w = d * sc * (u + qmin)             sc signed

Files of other writers have negative, zero and subnormal d, and super-blocks whose largest integer is not the largest
there is. So d and the integers are not found from the scales, but moved from the file's own: an integer is
round(scale / d), and only where that leaves its range, d grows by what is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .fixed_point import FILE_STORAGES
from .grid import Grid
from .in_file import FileStorage, moved_offset, offset_of
from .super_blocks import K_QUANTS, SUPER_BLOCK, KQuant, from_super_scales

_LARGEST = torch.finfo(torch.float16).max
Fields = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Half:
    """A float16 number, at a byte of each block."""

    at: int


@dataclass(frozen=True)
class Bits:
    """Bits of unsigned numbers, in bytes of each block.

    Attributes:
        at: the first byte.
        parts, fields, size: a part of the numbers is in `size` bytes, each of which has in its k-th field from the low
            end the number that stands k * `size` further on.
        width: bits of a field.
        above: the bits of a number that are elsewhere, below these.
        first: the first of the numbers.
        low: the bit of a byte where its first field begins.
        flipped: whether the number's highest bit is: two's complement, counted from the lowest number.
    """

    at: int
    parts: int
    fields: int
    size: int
    width: int
    above: int = 0
    first: int = 0
    low: int = 0
    flipped: bool = False

    @property
    def numbers(self) -> slice:
        """Which of the numbers have bits here."""
        return slice(self.first, self.first + self.parts * self.fields * self.size)

    @property
    def _bytes(self) -> slice:
        return slice(self.at, self.at + self.parts * self.size)

    def _shifts(self, device: torch.device) -> torch.Tensor:
        shifts = torch.arange(self.fields, dtype=torch.uint8, device=device) * self.width + self.low
        return shifts.unsqueeze(-1)

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """These bits of the numbers, in their place: uint8 [..., numbers]."""
        found = blocks[..., self._bytes].unflatten(-1, (self.parts, 1, self.size))
        if self.width < 8:
            found = (found >> self._shifts(blocks.device)) & (2**self.width - 1)
        found = found.flatten(-3)
        return (found ^ 128 if self.flipped else found) << self.above

    def write(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        """Put these bits of the numbers into blocks where there are zeros."""
        own = (numbers[..., self.numbers] >> self.above) & (2**self.width - 1)
        own = (own ^ 128 if self.flipped else own).unflatten(-1, (self.parts, self.fields, self.size))
        fields = own << self._shifts(blocks.device)
        for k in range(self.fields):
            blocks[..., self._bytes] |= fields[..., k, :].flatten(-2)


@dataclass(frozen=True)
class GGMLType(FileStorage):
    """A block type.

    Attributes:
        grid: of its weights, the only one.
        block: weights in a block.
        size: bytes of a block.
        layout: what lies where, by name: "codes", "d", and "m", or "sc", "dmin" and "mn".
        quant: the K-quant that it is.
    """

    grid: Grid = field(kw_only=True)
    block: int = field(kw_only=True)
    size: int = field(kw_only=True)
    layout: Mapping[str, Half | tuple[Bits, ...]] = field(kw_only=True, hash=False)
    quant: KQuant | None = field(default=None, kw_only=True)

    def problem(self, grid_bits: int, in_features: int) -> str:
        """Rows that are no whole blocks."""
        return f"has blocks of {self.block} weights" if in_features % self.block else ""

    def row_bytes(self, in_features: int) -> int:
        """Of whole blocks."""
        return in_features // self.block * self.size

    def decode(self, packed: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Codes, float32 [rows, in]."""
        return self._read("codes", packed).float().add_(self.grid.qmin)

    def scales_and_zeros(self, packed: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
        """s = d * sc, and b = M - qmin * s, as near as float32 has it."""
        s, M = self._values(self._numbers(packed))
        return s, None if M is None else offset_of(M, s, grid)

    def ship(
        self, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """S, and M or None."""
        return self._values(self._moved(packed, scale, zero))

    def write(
        self, packed: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> torch.Tensor:
        """New blocks: nothing is copied from W0's."""
        return self.pack(self._moved(packed, scale, zero) | {"codes": codes.to(torch.int16) - self.grid.qmin})

    def pack(self, numbers: Fields) -> torch.Tensor:
        """The bytes of numbers by name, uint8 [rows, row_bytes]; codes are counted from the lowest."""
        if self.quant is not None:
            numbers = numbers | {"sc": numbers["sc"] - self._lowest_scale}
        rows, count = numbers["d"].shape
        blocks = torch.zeros(rows, count, self.size, dtype=torch.uint8, device=numbers["d"].device)
        for name, place in self.layout.items():
            own = numbers[name].unflatten(-1, (count, -1))
            if isinstance(place, Half):
                blocks[..., place.at : place.at + 2] = own.to(torch.float16).view(torch.uint8)
            else:
                for bits in place:
                    bits.write(blocks, own.to(torch.uint8))
        return blocks.flatten(-2)

    @property
    def _lowest_scale(self) -> int:
        """Of the integers; a file's unsigned one may be 0."""
        return 0 if self.quant is None else min(0, self.quant.scale_range[0])

    def is_finite(self, packed: torch.Tensor) -> bool:
        """Whether no float16 number is NaN or infinity."""
        halves = (name for name, place in self.layout.items() if isinstance(place, Half))
        return all(bool(torch.isfinite(self._read(name, packed)).all()) for name in halves)

    def _read(self, name: str, packed: torch.Tensor) -> torch.Tensor:
        """Numbers of one name [rows, all of a row]: float32, or uint8 where they are no halves."""
        blocks, place = packed.unflatten(-1, (-1, self.size)), self.layout[name]
        if isinstance(place, Half):
            return blocks[..., place.at : place.at + 2].contiguous().view(torch.float16).flatten(-2).float()
        first = place[0].read(blocks)
        if place[0].numbers.stop < (count := max(bits.numbers.stop for bits in place)):
            first = torch.cat([first, first.new_zeros((*first.shape[:-1], count - first.shape[-1]))], -1)
        for bits in place[1:]:
            first[..., bits.numbers] |= bits.read(blocks)
        return first.flatten(-2)

    def _numbers(self, packed: torch.Tensor) -> Fields:
        """All but the codes, float32: halves [rows, n_blocks], integers [rows, n_groups]."""
        numbers = {name: self._read(name, packed).float() for name in self.layout if name != "codes"}
        if self.quant is not None:
            numbers["sc"] += self._lowest_scale
        return numbers

    def _values(self, numbers: Fields) -> tuple[torch.Tensor, torch.Tensor | None]:
        """S and M, exact in float32."""
        if self.quant is None:
            return numbers["d"], numbers.get("m")
        scale = from_super_scales(numbers["d"], numbers["sc"])
        return scale, -from_super_scales(numbers["dmin"], numbers["mn"]) if "mn" in numbers else None

    def _moved(self, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> Fields:
        """The file's own numbers, moved to a scale and zero."""
        own = self._numbers(packed)
        s, M = self._values(own)
        moved: Fields = {}
        if self.quant is None:
            moved["d"] = _half(scale)
        else:
            limits = self._lowest_scale, self.quant.scale_range[1]
            moved["d"], moved["sc"] = _integers(own["d"], own["sc"], scale, *limits)
        if M is None or zero is None:
            return moved
        M = moved_offset(M, s, zero, self._values(own | moved)[0], self.grid)
        if self.quant is None:
            moved["m"] = _half(M)
        else:
            moved["dmin"], moved["mn"] = _integers(own["dmin"], own["mn"], -M, *self.quant.min_range)
        return moved


def _half(values: torch.Tensor) -> torch.Tensor:
    """The nearest float16 numbers that are finite, as float32; no NaN is made a number."""
    return values.clamp(-_LARGEST, _LARGEST).to(torch.float16).float()


def _integers(
    d: torch.Tensor, own: torch.Tensor, scale: torch.Tensor, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """d and the integers of scales [rows, n_groups], from those of the file: d stays while the integers fit it.

    Args:
        d: the file's [rows, n_blocks]; where it is 0, no scale can move.
        own: the file's integers [rows, n_groups].
        scale: what is wanted.
        low: smallest integer, 0 where they are unsigned.
        high: largest integer.
    """
    dead = (d == 0).unsqueeze(-1)
    groups = (-1, scale.shape[-1] // d.shape[-1])
    wanted = torch.where(dead, own.unflatten(-1, groups), scale.unflatten(-1, groups) / d.unsqueeze(-1))
    needed = wanted.amax(-1) / high
    leaves = wanted.amax(-1).round() > high
    if low < 0:
        needed = torch.maximum(needed, wanted.amin(-1) / low)
        leaves |= wanted.amin(-1).round() < low
    grown = torch.where(leaves, _half_up(d * needed), d)
    shrunk = torch.where(leaves, d / grown, 1.0).unsqueeze(-1)
    return grown, (wanted * shrunk).round().clamp(low, high).flatten(-2)


def _half_up(values: torch.Tensor) -> torch.Tensor:
    """The nearest float16 numbers of no smaller magnitude, as float32."""
    values = values.clamp(-_LARGEST, _LARGEST)
    halves = values.to(torch.float16)
    short = halves.float().abs() < values.abs()
    return (halves.view(torch.int16) + short.to(torch.int16)).view(torch.float16).float()  # the next in magnitude


def _legacy(name: str, number: int, bits: int, offset: bool) -> GGMLType:
    """A type of 32 weights, without integers beside the codes."""
    layout: dict[str, Half | tuple[Bits, ...]] = {"d": Half(0)}
    if offset:
        layout["m"] = Half(2)
    at = 2 * len(layout)
    if bits == 8:
        layout["codes"] = (Bits(at, 1, 1, 32, 8, flipped=True),)
    elif bits == 5:
        layout["codes"] = (Bits(at + 4, 1, 2, 16, 4), Bits(at, 4, 8, 1, 1, above=4))
    else:
        layout["codes"] = (Bits(at, 1, 2, 16, 4),)
    return GGMLType(
        bits,
        100 + number,
        name=name,
        grid=Grid(bits, 32, "float" if offset else "none", torch.float16),
        block=32,
        size=at + 4 * bits,
        layout=layout,
    )


def _k_quant(name: str, number: int, size: int, **layout: Half | tuple[Bits, ...]) -> GGMLType:
    quant = next(quant for quant in K_QUANTS.values() if quant.name == name)
    grid = Grid(quant.bits, quant.group_size, quant.zero_point, torch.float32, True)  # type: ignore[arg-type]
    return GGMLType(
        quant.bits, 100 + number, name=name, grid=grid, block=SUPER_BLOCK, size=size, layout=layout, quant=quant
    )


def _six_bits(at: int, rest: int, low: int) -> tuple[Bits, ...]:
    """Eight numbers of 6 bits: four whole, in whose bytes' spare bits the others' high ones are."""
    return (
        Bits(at, 1, 1, 4, 6),
        Bits(rest, 1, 1, 4, 4, first=4, low=low),
        Bits(at, 1, 1, 4, 2, above=4, first=4, low=6),
    )


# Of Q4_K and Q5_K.
_SCALES_AND_MINS: dict[str, Half | tuple[Bits, ...]] = {
    "d": Half(0),
    "dmin": Half(2),
    "sc": _six_bits(4, 12, 0),
    "mn": _six_bits(8, 12, 4),
}
# The numbers are 100 and GGML's own.
GGML_TYPES: dict[str, GGMLType] = {
    kind.name: kind
    for kind in (
        _legacy("Q4_0", 2, 4, offset=False),
        _legacy("Q4_1", 3, 4, offset=True),
        _legacy("Q5_0", 6, 5, offset=False),
        _legacy("Q5_1", 7, 5, offset=True),
        _legacy("Q8_0", 8, 8, offset=False),
        _k_quant(
            "Q2_K",
            10,
            84,
            sc=(Bits(0, 1, 1, 16, 4),),
            mn=(Bits(0, 1, 1, 16, 4, low=4),),
            codes=(Bits(16, 2, 4, 32, 2),),
            d=Half(80),
            dmin=Half(82),
        ),
        _k_quant(
            "Q3_K",
            11,
            110,
            codes=(Bits(32, 2, 4, 32, 2), Bits(0, 1, 8, 32, 1, above=2)),
            sc=(Bits(96, 1, 2, 8, 4), Bits(104, 1, 4, 4, 2, above=4)),
            d=Half(108),
        ),
        _k_quant(
            "Q4_K",
            12,
            144,
            **_SCALES_AND_MINS,
            codes=(Bits(16, 4, 2, 32, 4),),
        ),
        _k_quant(
            "Q5_K",
            13,
            176,
            **_SCALES_AND_MINS,
            codes=(Bits(48, 4, 2, 32, 4), Bits(16, 1, 8, 32, 1, above=4)),
        ),
        _k_quant(
            "Q6_K",
            14,
            210,
            codes=(Bits(0, 2, 2, 64, 4), Bits(128, 2, 4, 32, 2, above=4)),
            sc=(Bits(192, 1, 1, 16, 8, flipped=True),),
            d=Half(208),
        ),
    )
}
FILE_STORAGES.update(GGML_TYPES)
