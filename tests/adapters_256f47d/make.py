"""Adapters as an earlier version of the package saved them, for the test that today's still loads them to the bit.

    python tests/adapters_256f47d/make.py        with the package of commit 256f47d installed

The weights are exact in bfloat16 and the inputs are unit vectors, so nothing here depends on the order of a sum.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

import peft_dlqat
from peft_dlqat import DLQATConfig

HERE = Path(__file__).parent
IN, OUT = 256, 4
CONFIGS = {
    "dlqat-integer": {"bits": 3, "group_size": 32, "zero_point": "integer"},
    "dlqat-none-row": {"bits": 2, "group_size": -1, "zero_point": "none"},
    "dlqat-float": {"bits": 4, "group_size": 64, "zero_point": "float", "scale_dtype": "float16"},
    "dlqat-row-magnitude": {"bits": 3, "group_size": 64, "magnitude": "row", "gradient": "lowrank"},
    "dlqat-no-magnitude": {"bits": 3, "group_size": 64, "magnitude": False, "zero_point": "none"},
    "dlqat-int4": {"bits": 3, "group_size": 32, "zero_point": "integer", "storage": "int4"},
    "dlqat-q3_k": {"bits": 3, "group_size": 16, "zero_point": "none", "scale_dtype": "k_quant"},
    "dlqat-q2_k": {"bits": 2, "group_size": 16, "zero_point": "float", "scale_dtype": "k_quant"},
    "lrqat": {"bits": 3, "group_size": 32, "zero_point": "integer", "method": "lrqat"},
    "l4q": {"bits": 4, "group_size": 32, "zero_point": "float", "method": "l4q"},
    "peqa": {"bits": 3, "group_size": 32, "zero_point": "none", "method": "peqa"},
    "qalora": {"bits": 3, "group_size": 32, "zero_point": "float", "method": "qalora"},
}


def spread(shape: tuple[int, ...], step: float, seed: int) -> torch.Tensor:
    """Numbers that look random, all of them small multiples of a power of two."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return (((index * 7919 + seed * 104729) % 251 - 125).float() * step).view(shape)


def base_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    model[0].weight.data = spread((OUT, IN), 2.0**-10, 1)
    return model


def main() -> None:
    for name, settings in CONFIGS.items():
        model = get_peft_model(base_model(), DLQATConfig(r=1, lora_alpha=1, target_modules=["0"], **settings))
        for seed, (key, parameter) in enumerate(sorted(model.named_parameters())):
            if ".dlqat_" in key:
                step = 2.0**-10 if "magnitude" in key else 2.0**-7
                parameter.data += spread(tuple(parameter.shape), step, seed + 2)
        if settings.get("storage"):
            peft_dlqat.pack_weights(model)
        layer = model.base_model.model[0]
        weight = layer.quantized_weight()
        zero = {} if weight.zero is None else {"zero": weight.zero}
        with torch.no_grad():
            output = model(torch.eye(IN))
        folder = HERE / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        config = json.loads((folder / "adapter_config.json").read_text())
        config = {key: value for key, value in config.items() if value is not None and value not in ([], {})}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        save_file(
            {"codes": weight.codes, "scale": weight.scale, **zero, "output": output}, folder / "expected.safetensors"
        )


if __name__ == "__main__":
    main()
