"""torchao's quantization-aware training with LoRA outside the quantizer, as torchtune's QAT + LoRA recipe has it.

    y = x Q(W0)^T + scaling * x A^T B^T,    Q(W) = S * clip(round((W - M) / S), 0, 2**bits - 1) + M

W0, S and M are frozen ("mse" round-to-nearest, the better of our two starts), A and B train. What has been trained is
Q(W0) + scaling * BA, which lies on no grid: `finish` rounds W0 + scaling * BA, and `unmerged` keeps A and B in 16 bits
beside the low-bit weight, at their cost in memory and time.

Libraries: torchao (`quantize_` with `QATConfig`, `IntxFakeQuantizeConfig`; seen with 0.18.0 on CPU), peft. torchao
fake-quantizes weights of 1 to 8 bits by group or row, symmetric, with an integer zero point, or with a real-valued
one; its own choice of S and M is min-max with an integer zero point, so ours are put in.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from . import rtn
from .common import Config, Prepared, fit, grid_of, linear_layers
from .lora import add_lora, lora_group, merged, sixteen_bits

try:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.quant_primitives import ZeroPointDomain
except ImportError as error:
    raise ImportError("the peer torchao_qat_lora needs torchao: pip install torchao==0.18.0") from error


def prepare(model: PreTrainedModel, config: Config) -> Prepared:
    """Fake-quantize every linear layer but the head and put LoRA beside it."""
    for name in linear_layers(model):
        fake_quantize(model, name, config)
    adapted = add_lora(model, config)

    def finish() -> PreTrainedModel:
        final = merged(adapted).eval()
        quantize_(final, QATConfig(step="convert"), filter_fn=is_fake_quantized)
        return rtn.quantize(final, config)

    return Prepared(adapted, lora_group(adapted), finish, lambda: unmerged(adapted))


def fake_quantize(model: PreTrainedModel, name: str, config: Config) -> None:
    """Replace one linear layer by torchao's, with S and M of its weight."""
    layer = model.get_submodule(name)
    grid = grid_of(config, layer)
    scale, offset = fit(layer.weight, grid, "mse")
    real = grid.zero_point == "float"
    quantizer = IntxFakeQuantizeConfig(
        getattr(torch, f"int{grid.bits}"),
        group_size=grid.group_size,
        is_symmetric=False,
        zero_point_domain=ZeroPointDomain.FLOAT if real else ZeroPointDomain.INT,
        is_dynamic=False,
    )
    quantize_(model, QATConfig(weight_config=quantizer), filter_fn=lambda _, found: found == name)
    # torchao counts codes from qmin and has the zero either in units of the weight or of the code.
    fake_quantizer = model.get_submodule(name).weight_fake_quantizer
    fake_quantizer.scale = scale
    fake_quantizer.zero_point = offset - grid.qmin * scale if real else (grid.qmin - offset / scale).round().int()


def is_fake_quantized(module: torch.nn.Module, name: str) -> bool:
    """Whether torchao has replaced this module."""
    return isinstance(module, FakeQuantizedLinear)


@torch.no_grad()
def unmerged(model: PeftModel) -> PeftModel:
    """A copy with low-bit weights, dequantized, and A and B of 16 bits beside them."""
    final = sixteen_bits(model)
    for module in final.modules():
        if is_fake_quantized(module, ""):
            module.weight.copy_(module.weight_fake_quantizer(module.weight))
    quantize_(final, QATConfig(step="convert"), filter_fn=is_fake_quantized)
    return final
