"""Q8_0's rounding is ggml's."""

import pytest
import torch

from peft_dlqat.formats.q8_0 import held_q8_0, round_q8_0


def test_it_is_ggmls_own_and_finds_itself_again():
    gguf = pytest.importorskip("gguf")
    value = 0.1 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    value[3], value[5] = 0.0, value[5] * 1e-8  # a block of zeros, and scales that float16 has as 0
    kind = gguf.GGMLQuantizationType.Q8_0
    rounded = held_q8_0(value)
    assert torch.equal(rounded, torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind)))
    assert torch.equal(round_q8_0(rounded), rounded) and not torch.equal(rounded, value)
    assert torch.equal(held_q8_0(rounded), rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_was_rounded_is_held_exactly_whatever_the_dtype(dtype):
    """Though a file's d has ten digits, and d * q more than 16 bits have."""
    value = 0.1 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    value[3], value[5], value[6] = 0.0, value[5] * 1e-8, value[6] * 1e4
    value = value.to(dtype)
    rounded = round_q8_0(value)
    assert torch.equal(round_q8_0(rounded), rounded) and torch.equal(held_q8_0(rounded), rounded)
    assert torch.equal(round_q8_0(value.float()), rounded.float())
    largest = value.float().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    error = (rounded.float() - value.float()).unflatten(-1, (-1, 32)).abs()
    assert (error <= largest / 127 + 2.0**-25).all()  # half a step that is at most twice ggml's
