"""What an adapter remembers, in each layer, of how it was made: numbers beside the tensors that they are true of."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

# Names are only appended; the first stands for any other, or none.
_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of so many bits each number of a checksum is, and so many there are: bfloat16 holds them exactly, too.
_BITS, _PARTS = 8, 9
# Values of a weight that are looked at: other weights differ in nearly all of them, and the whole of a large model
# would take minutes.
_SAMPLE = 2**16


class OtherBaseWarning(UserWarning):
    """An adapter is loaded on other base weights than it was trained on.

    `warnings.simplefilter("error", peft_dlqat.OtherBaseWarning)` makes an error of it, raised before any tensor is
    loaded, but by transformers' own `load_adapter`: there in the first forward pass.
    """


@dataclass(frozen=True)
class Record:
    """What is remembered.

    Attributes:
        calibrated: whether the scales and zeros were fitted to data.
        dtype: of W0; None where it is not known.
        checksum: of W0 as it was before it was packed, see `weight_checksum`; 0 where it is not known.
    """

    calibrated: bool = False
    dtype: torch.dtype | None = None
    checksum: int = 0

    @classmethod
    def of_weight(cls, weight: torch.Tensor) -> Record:
        """The record of an adapter that is new on this W0 [out, in]."""
        dtype = weight.dtype if weight.dtype in _DTYPES else None
        return cls(dtype=dtype, checksum=weight_checksum(weight))

    @classmethod
    def of_file(cls, packed: torch.Tensor, kind: str, dtype: torch.dtype) -> Record:
        """The record of an adapter that is new on a file's tensor: calibrated, and with a checksum of all its bytes.

        Args:
            packed: the bytes, uint8 [out, row_bytes].
            kind: the type of tensor.
            dtype: the one to compute in.
        """
        digest = hashlib.sha256(f"{kind} {tuple(packed.shape)}".encode())
        digest.update(packed.cpu().contiguous().numpy().data)
        return cls(True, dtype, int.from_bytes(digest.digest()[: _BITS * _PARTS // 8], "big") or 1)

    def fits(self, base: Record) -> bool:
        """Whether an adapter with this record belongs to the W0 that `base` is of, as far as both are known."""
        return 0 in (self.checksum, base.checksum) or self.checksum == base.checksum

    def encode(self) -> torch.Tensor:
        """As numbers: [calibrated, dtype, nine of the checksum], float32 [11]."""
        parts = [self.checksum >> _BITS * part & 2**_BITS - 1 for part in range(_PARTS)]
        return torch.tensor([self.calibrated, _DTYPES.index(self.dtype), *parts], device="cpu", dtype=torch.float32)

    @classmethod
    def decode(cls, encoded: torch.Tensor) -> Record:
        """The record of these numbers.

        Raises:
            ValueError: if they are no record's.
        """
        calibrated, dtype, *parts = encoded.tolist() if encoded.dim() == 1 and len(encoded) > 1 else (2, 0)
        whole = all(0 <= part < 2**_BITS and part == int(part) for part in parts)
        if calibrated not in (0, 1) or dtype not in range(len(_DTYPES)) or len(parts) != _PARTS or not whole:
            raise ValueError(
                f"{encoded.tolist()} is no record of an adapter: the file is broken, or another version's"
            )
        checksum = sum(int(part) << _BITS * index for index, part in enumerate(parts))
        return cls(bool(calibrated), _DTYPES[int(dtype)], checksum)


def weight_checksum(weight: torch.Tensor) -> int:
    """A checksum of a weight's shape and of up to 2**16 of its values, evenly spread; the same in any exact dtype.

    Of 72 bits, and never 0.
    """
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(sample(weight, _SAMPLE).float().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[: _BITS * _PARTS // 8], "big") or 1


def sample(weight: torch.Tensor, count: int) -> torch.Tensor:
    """At most so many of a weight's values, evenly spread: of all rows and of all columns."""
    step = max(1, -(-weight.numel() // count))
    while math.gcd(step, weight.shape[-1]) > 1:  # or only some columns would be seen
        step += 1
    return weight.detach().reshape(-1)[::step]
