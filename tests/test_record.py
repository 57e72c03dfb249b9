"""What an adapter remembers of how it was made."""

import pytest
import torch

from peft_dlqat.record import Record, sample, weight_checksum


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("calibrated", [False, True])
def test_numbers_are_the_record(dtype, calibrated):
    record = Record(calibrated, dtype, weight_checksum(torch.randn(3, 5)))
    encoded = record.encode()
    assert encoded.dtype == torch.float32 and Record.decode(encoded) == record
    assert Record.decode(torch.zeros(11)) == Record()


def test_a_checksum_is_that_of_the_numbers_and_their_shape():
    weight = torch.randn(64, 32).bfloat16()
    checksum = weight_checksum(weight)
    assert 2**60 < checksum < 2**72 and checksum == weight_checksum(weight.float()) == weight_checksum(weight.double())
    changed = weight.clone()
    changed[63, 31] += 1
    others = {weight_checksum(other) for other in (changed, weight.t(), weight.view(32, 64))}
    assert len({checksum} | others) == 4
    assert weight_checksum(torch.randn(1000, 1000)) != weight_checksum(torch.randn(1000, 1000))
    assert Record.of_weight(weight) == Record(False, torch.bfloat16, checksum)
    assert Record.of_weight(torch.zeros(2, 2, dtype=torch.float8_e4m3fn)).dtype is None


@pytest.mark.parametrize(
    "numbers",
    [
        [2, 1],
        [0, 5],
        [0, 1.5],
        *([0, 1, value] for value in (2**8, -1, 0.5, float("nan"), float("inf"))),
    ],
)
def test_other_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match="no record of an adapter"):
        Record.decode(torch.tensor(numbers + (11 - len(numbers)) * [0]))


@pytest.mark.parametrize("length", [2, 10, 12])
def test_other_lengths_are_refused(length):
    with pytest.raises(ValueError, match="no record of an adapter"):
        Record.decode(torch.zeros(length))


@pytest.mark.parametrize("shape", [(64, 32), (256, 4096), (48, 36), (7, 5), (1, 9), (3, 1)])
def test_a_sample_is_of_all_rows_and_columns(shape):
    """Evenly spread over a row-major weight it would be of one column, where the one divides the other."""
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    for count in (16, 64, 2**16):
        found = [sample(which, count) for which in (rows, columns)]
        assert len(found[0]) <= count
        for seen, size in zip(found, shape, strict=True):
            assert len(seen.unique()) >= min(size, count) // 3


def test_a_record_fits_the_weight_it_is_of_and_what_is_not_known():
    weight = torch.randn(4, 8)
    own, other, unknown = Record.of_weight(weight), Record.of_weight(weight + 1), Record()
    assert own.fits(own) and own.fits(unknown) and unknown.fits(own)
    assert own.fits(Record.of_weight(weight.double())) and not own.fits(other) and not other.fits(own)
