"""Q8_0's rounding is ggml's."""

import pytest
import torch

from peft_dlqat.formats.q8_0 import round_q8_0


def test_it_is_ggmls_own_and_finds_itself_again():
    gguf = pytest.importorskip("gguf")
    value = 0.1 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    value[3], value[5] = 0.0, value[5] * 1e-8  # a block of zeros, and scales that float16 has as 0
    kind = gguf.GGMLQuantizationType.Q8_0
    rounded = round_q8_0(value)
    assert torch.equal(rounded, torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind)))
    assert torch.equal(round_q8_0(rounded), rounded) and not torch.equal(rounded, value)
