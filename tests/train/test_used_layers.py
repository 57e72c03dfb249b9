"""An adapter layer that the model passes by is an error; one whose parent doesn't run is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_dlqat import DLQATConfig, calibrate
from peft_dlqat.layer import adapter_layers


class Block(nn.Module):
    """Calls one layer, reads another, and may pass by a third."""

    def __init__(self, passes_by: bool) -> None:
        super().__init__()
        self.called, self.read, self.third = (nn.Linear(32, 32) for _ in range(3))
        self.passes_by = passes_by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(self.called(x), self.read.weight, self.read.bias)
        weight = self.third.base_layer.weight if hasattr(self.third, "base_layer") else self.third.weight
        return x @ weight.t() if self.passes_by else self.third(x)


class Net(nn.Module):
    """Two blocks, of which the second runs for some batches."""

    def __init__(self, passes_by: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.sometimes = Block(passes_by), Block(False)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        x = self.first(x)
        logits = self.head(self.sometimes(x) if labels[0] == 0 else x)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


@pytest.mark.parametrize("rare", [True, False])
@pytest.mark.parametrize("passes_by", [True, False])
def test_calibration_names_a_layer_that_is_passed_by(passes_by, rare):
    config = DLQATConfig(bits=3, group_size=32, r=4, target_modules="all-linear", exclude_modules=["head"])
    model = get_peft_model(Net(passes_by), config)
    labels = [torch.tensor([1, 2]), torch.tensor([1 if rare else 0, 2])]  # with 0 the second block runs
    batches = [{"x": torch.randn(2, 32), "labels": own} for own in labels]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not passes_by:
        calibrate(model, batches, steps=1, objective="task", progress=False)
        return
    with pytest.raises(ValueError, match=r"1 adapter layers are neither called nor read .*first\.third: training"):
        calibrate(model, batches, steps=1, objective="task", progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in adapter_layers(model)[1].values())
