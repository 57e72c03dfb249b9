"""Which implementation a weight gets; see test_triton_kernels for what each computes."""

from types import SimpleNamespace

import pytest
import torch

from peft_dlqat.quant.dispatch import _on_nvidia


@pytest.mark.parametrize(
    "device, cuda, expected", [("cuda", "12.8", True), ("cuda", None, False), ("cpu", "12.8", False)]
)
def test_only_nvidias_gpus_have_kernels(device, cuda, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)  # AMD's are "cuda", of a torch without it
    assert _on_nvidia(SimpleNamespace(device=SimpleNamespace(type=device))) is expected
