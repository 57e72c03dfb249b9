"""The fast path beside the formula as it stands on a page: value and gradients, through a whole layer."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dlqat import DLQATConfig
from peft_dlqat.quant.naive import quantize


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("bits,group_size", [(2, 16), (3, -1), (4, 32)])
def test_a_layer_is_the_formula(bits, group_size, zero_point):
    config = DLQATConfig(bits=bits, group_size=group_size, zero_point=zero_point, r=4, lora_alpha=8)
    config.target_modules = {"0"}
    layer = get_peft_model(nn.Sequential(nn.Linear(64, 24, bias=False)), config).base_model.model[0]
    trained = layer.trained("default")
    for tensor, parameter in trained.values():
        parameter.data += 0.2 / tensor.unit * torch.randn(parameter.shape)
    s, zero = layer.scales_and_zeros("default")
    zeros = {"z": zero if zero_point == "integer" else None, "b": zero if zero_point == "float" else None}
    values = {name: tensor.value(parameter.detach()) for name, (tensor, parameter) in trained.items()}
    copies = {name: value.clone().requires_grad_(True) for name, value in values.items()}
    w_hat = quantize(
        layer.get_base_layer().weight.detach(),
        copies["A"],
        copies["B"],
        copies["magnitude"],
        s,
        **zeros,
        shift=copies.get("shift"),
        bits=bits,
        scaling=2.0,
    )
    assert torch.equal(w_hat, layer.quantized_weight().dequantize())
    x = torch.randn(5, 64)
    weights = torch.randn(5, 24)
    (nn.functional.linear(x, w_hat) * weights).sum().backward()
    (layer(x) * weights).sum().backward()
    for name, (tensor, parameter) in trained.items():
        error = (parameter.grad / tensor.unit - copies[name].grad).norm() / copies[name].grad.norm()
        assert error < 1e-5, f"gradient of {name}: relative error {error:.1e}"
