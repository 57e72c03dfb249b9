"""The arithmetic of `reference` through torch.compile, for CPUs.

Codes and w_hat are the same to the bit: casts to 16 bits are kept, and no product is fused with a sum. Only sums over
a group add up in another order. Each shape is compiled when it first comes, which takes seconds; when torch.compile
has had as many as it allows, plain torch goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from ..quant import reference
from .quantizer import Quantizer


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # For sizes that are not fixed, compiled code is no faster than plain torch.
    compiled = torch.compile(function, dynamic=False, options={"emulate_precision_casts": True})

    @torch.no_grad()  # the op has its own backward, and no use for that of its parts
    def run(*arguments: Any) -> Any:
        return compiled(*map(_detached, arguments))

    return run


def _detached(argument: Any) -> Any:
    if isinstance(argument, Quantizer):
        return replace(
            argument, **{field.name: _detached(getattr(argument, field.name)) for field in fields(argument)}
        )
    return argument.detach() if isinstance(argument, torch.Tensor) else argument


codes = reference.codes  # once, at merge: not worth compiling
quantized = partial(reference.quantized, of_rows=_compile(reference.quantized_rows))
weight_grads = _compile(reference.weight_grads)
