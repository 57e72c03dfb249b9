"""LoRA (arXiv 2106.09685) beside the weights: y = x W^T + scaling * x A^T B^T, by PEFT's `LoraConfig`.

As a peer it trains in full precision, and is merged and rounded to nearest at the end: training that knows of no
quantizer, as a user has it who fine-tunes first and quantizes afterwards.

    w_hat = S * clip(round((W0 + scaling * BA - M) / S), 0, 2**bits - 1) + M

It needs an objective of its own, such as the next-token loss: at the start its divergence from the full-precision
model is zero, and so is every gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from . import rtn
from .common import Config, Prepared


def prepare(model: PreTrainedModel, config: Config) -> Prepared:
    """LoRA on full-precision weights; rounding comes with `finish`."""
    adapted = add_lora(model, config)
    return Prepared(adapted, lora_group(adapted), lambda: rtn.quantize(merged(adapted).eval(), config))


def add_lora(model: PreTrainedModel, config: Config) -> PeftModel:
    """LoRA on every linear layer but the head, with the rank and alpha of `config`; B starts at zero."""
    lora = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def lora_group(model: nn.Module) -> list[dict[str, Any]]:
    """A and B of every layer as one optimiser group."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr_factor": 1.0}]


def merged(model: PeftModel) -> PreTrainedModel:
    """A copy with W + scaling * BA for weights, and no adapter."""
    return copy.deepcopy(model).merge_and_unload()


@torch.no_grad()
def sixteen_bits(model: PeftModel) -> PeftModel:
    """A copy whose A and B are values of bfloat16."""
    model = copy.deepcopy(model)
    for parameter in lora_group(model)[0]["params"]:
        parameter.copy_(parameter.bfloat16())
    return model.eval()
