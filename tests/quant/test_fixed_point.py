"""Which grids and layers a storage takes, and its packing; what packed layers compute is tested in test_frozen."""

from __future__ import annotations

import pytest
import torch

from peft_dlqat.quant.fixed_point import STORAGES, Storage, as_rows, storage_of
from peft_dlqat.quant.grid import Grid

PACKED = ("int8", "int4", "int2")


def test_a_storage_holds_grids_of_no_more_bits():
    held = {name: [bits for bits in range(2, 9) if not STORAGES[name].problem(bits, 8)] for name in STORAGES}
    assert held == {"full": [*range(2, 9)], "int8": [*range(2, 9)], "int4": [2, 3, 4], "int2": [2]}
    assert STORAGES["int2"].problem(3, 8) == "cannot hold codes of 3 bits; use 'full' or 'int8' or 'int4'"


def test_rows_are_whole_bytes():
    held = {name: [size for size in range(1, 9) if not STORAGES[name].problem(2, size)] for name in STORAGES}
    assert held == {"full": [*range(1, 9)], "int8": [*range(1, 9)], "int4": [2, 4, 6, 8], "int2": [4, 8]}
    assert "in_features=6 is no multiple of 4;" in STORAGES["int2"].problem(2, 6)


@pytest.mark.parametrize("name", PACKED)
def test_units_come_back_as_the_middle_of_their_part_of_the_cell(name):
    storage, grid = STORAGES[name], Grid(2, 8, "none", torch.bfloat16)
    parts = 2 ** (storage.bits - 2)
    cells = torch.arange(4 * parts)  # all numbers that there are
    units = ((cells + 0.5) / parts - 2.5).repeat(3, 2)
    packed = storage.encode(units + 0.3 / parts, (units + 0.3 / parts).round().clamp(-2, 1), grid)
    assert packed.dtype == torch.uint8 and packed.shape == (3, units.shape[1] * storage.bits // 8)
    assert torch.equal(storage.decode(packed, grid), units)


@pytest.mark.parametrize("name", PACKED)
def test_what_lies_beyond_the_ends_comes_to_just_inside(name):
    storage, grid = STORAGES[name], Grid(2, 8, "none", torch.bfloat16)
    units = torch.tensor([[-9.0, 9.0] * 4])
    half = 2.0 ** -(storage.bits - 2) / 2
    found = storage.decode(storage.encode(units, units.clamp(-2, 1), grid), grid)
    assert found[0, :2].tolist() == [-2.5 + half, 1.5 - half]


def test_names_and_rows():
    assert [storage_of(bits) for bits in (0, 2, 3, 4, 8)] == ["full", "int2", None, "int4", "int8"]
    weight = torch.zeros(3, 5)
    assert as_rows(weight, True).shape == (5, 3) and as_rows(weight, False) is weight
    assert as_rows(weight.to(torch.uint8), True).shape == (3, 5)


@pytest.mark.parametrize("bits", [3, 5, 16])
def test_a_width_that_this_packing_does_not_know_is_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be 2, 4 or 8"):
        Storage(bits)
    other = type("Other", (Storage,), {})(bits)  # with a packing of its own
    assert other.number == bits and type(other)(bits, 99).number == 99
