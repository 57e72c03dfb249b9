"""What an artefact should hold where the format rounds: computed from the source again, apart from the writer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ..export import gguf
from ..formats import Rule
from ..quant.quantizer import QuantizedWeight
from .fitting import fitted
from .hf import as_dense
from .options import Options
from .source import Entry, Source


def read_written(
    source: Source, rule: Rule, options: Options, names: Iterable[str]
) -> Iterator[tuple[Entry, torch.Tensor | QuantizedWeight]]:
    """As `Source.read`, weights on the grids that were written and dense tensors rounded as they were.

    What the writer makes of them afterwards, its packing, names and order of rows, has no part in it: an engine that
    finds the same logits has found all that in order.
    """
    apart = replace(options, kept_dense=[], grids={}, rounded=[], rescaled=[])  # the writer has filled its own
    for entry, value in fitted(source, rule, apart, names):
        if isinstance(value, QuantizedWeight) and rule.name != "dense":
            yield entry, value
            continue
        dense = value.dequantize() if isinstance(value, QuantizedWeight) else value
        if rule.name == "gguf":
            yield entry, gguf.rounded(dense, entry, source, apart)
        else:
            yield entry, as_dense(dense, entry, apart)
