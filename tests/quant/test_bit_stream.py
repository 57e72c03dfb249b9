"""Bits packed without a gap, compared with NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_dlqat.quant.bit_stream import pack_bits, unpack_bits


@pytest.mark.parametrize("count", [1, 7, 32, 45])
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_is_numpys_little_endian_stream(bits, count):
    numbers = torch.randint(0, 2**bits, (3, 2, count), dtype=torch.uint8)
    packed = pack_bits(numbers, bits)
    each = (numbers.numpy()[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    expected = np.packbits(each.reshape(3, 2, -1), axis=-1, bitorder="little")
    assert np.array_equal(packed.numpy(), expected)
    assert torch.equal(unpack_bits(packed, bits, count), numbers)


def test_of_nothing_only_the_size_is_told():
    packed = pack_bits(torch.empty(4, 45, dtype=torch.uint8, device="meta"), 3)
    assert packed.shape == (4, 17)
