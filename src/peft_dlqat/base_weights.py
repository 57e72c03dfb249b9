"""The base model's weights as an adapter begins with them: a LoRA adapter merged, the embeddings rounded.

Both are done when an adapter is put into a model, new or saved, and again where weights are read from disk. So the
adapter's file needs neither, and belongs to the base model as it was downloaded.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import DLQATConfig
from .contents import CHANGED
from .formats.q8_0 import Q8_0_BLOCK, round_q8_0
from .frozen import check_float_weight
from .layer import DLQATLayer
from .lora_arguments import MERGE_IT, check_mergeable
from .module_names import folded
from .placement import check_whole, full_shape, is_offloaded, is_partitioned
from .quant.fixed_point import as_rows
from .targets import is_target, out_in

_ROUNDED = "rounded to Q8_0"
# Rows of a weight that are changed together, in float64.
_ROWS = 1024


@dataclass(frozen=True)
class _Update:
    """scaling * BA of a LoRA layer; `transposed` where the model has the weight as [in, out]."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    transposed: bool

    @property
    def name(self) -> str:
        """What it is known by, wherever its file lies."""
        content = b"".join(tensor.float().numpy().tobytes() for tensor in (self.A, self.B))
        return hashlib.sha256(content + str(self.scaling).encode()).hexdigest()[:8]

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight and the update, added in float64 on the CPU: every machine finds the same bits."""
        pairs = zip(as_rows(weight, self.transposed).split(_ROWS), self.B.double().split(_ROWS), strict=True)
        A = self.scaling * self.A.double()
        summed = torch.cat([(rows.cpu().double() + B @ A).to(weight.dtype) for rows, B in pairs])
        return as_rows(summed, self.transposed).contiguous().to(weight.device)


class BaseChanges:
    """What a config makes of a base model's weights before they are quantized.

    Args:
        config: the adapter's.
        model: the base model, with adapters or without, in memory or not.

    Raises:
        ValueError: for a LoRA adapter that cannot be merged into this model, or an embedding whose rows Q8_0 cannot
            hold.
    """

    def __init__(self, config: DLQATConfig, model: nn.Module) -> None:
        self._model = model
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._tied = {name: tied for tied in names.values() for name in tied}
        self._updates = {} if config.lora is None else self._read(config.lora)
        self._rounded = self._embeddings(config) if config.embeddings is not None else set()

    def of(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the base model as the adapter begins with it.

        Args:
            name: its name in the base model, without adapters.
            weight: the tensor as the model has it, in its dtype there.
        """
        if name in self._updates:
            weight = self._updates[name].added_to(weight)
        return round_q8_0(weight) if name in self._rounded else weight

    @torch.no_grad()
    def apply(self) -> None:
        """Change the weights of the model itself, but for those on the meta device, which come later.

        Nothing happens to what another adapter with the same settings has changed already.

        Raises:
            ValueError: if adapters are in the model that go with other weights; for weights that are elsewhere.
        """
        wanted = {name: self._mark(name) for name in [*self._updates, *self._rounded]}
        adapted = any(isinstance(module, DLQATLayer) for module in self._model.modules())
        todo: dict[int, tuple[nn.Parameter, str]] = {}  # of tied ones the first
        for prefix, module in self._model.named_modules():
            parameter, name = module._parameters.get("weight"), _plain(f"{prefix}.weight")
            if parameter is None or ".modules_to_save." in prefix or (parameter.is_meta and not is_offloaded(module)):
                continue
            mark, found = wanted.get(name, ""), getattr(module, CHANGED, "")
            if mark == found:
                continue
            if found or adapted:
                unchanged = "as the base model has it"
                raise ValueError(
                    f"{name} is {found or unchanged}, and this adapter wants it {mark or unchanged}: all adapters of "
                    "a model share it; use the same lora= and embeddings=, or load the base model again."
                )
            if is_offloaded(module) or is_partitioned(parameter):
                raise ValueError(
                    f"{name} is to be {mark}, but is offloaded or partitioned; load the base model whole, or, for "
                    "packed storage, by load_packed()."
                )
            check_whole(parameter)
            check_float_weight(module, "change")
            todo.setdefault(id(parameter), (parameter, name))
        for parameter, name in todo.values():
            parameter.data = self.of(name, parameter.data)
        for prefix, module in self._model.named_modules():
            if mark := wanted.get(_plain(f"{prefix}.weight"), ""):
                setattr(module, CHANGED, mark)

    def _mark(self, name: str) -> str:
        merged = f"merged with LoRA {self._updates[name].name}" if name in self._updates else ""
        return " and ".join(filter(None, (merged, _ROUNDED if name in self._rounded else "")))

    def _embeddings(self, config: DLQATConfig) -> set[str]:
        """Names of the token embedding's and the output head's weight, where they stay frozen and dense."""
        if not isinstance(self._model, PreTrainedModel):
            raise ValueError(
                f"embeddings='q8_0' needs a model of transformers, not a {type(self._model).__name__}; leave it out."
            )
        found: set[str] = set()
        for module in (self._model.get_input_embeddings(), self._model.get_output_embeddings()):
            inside: Any = getattr(module, "original_module", module)
            name = next((name for name, other in self._model.named_modules() if other is inside), "")
            plain = _plain(f"{name}.weight").removesuffix(".weight")
            trained = any(plain == saved or plain.endswith(f".{saved}") for saved in config.modules_to_save or ())
            if not name or trained or isinstance(inside, DLQATLayer) or is_target(config, plain):
                continue
            weight = getattr(inside, "weight", None)
            if weight is None or not weight.is_floating_point():
                continue
            if (columns := full_shape(weight)[-1]) % Q8_0_BLOCK:
                raise ValueError(
                    f"embeddings='q8_0' needs rows of a multiple of {Q8_0_BLOCK}, but {plain}.weight has rows of "
                    f"{columns}; leave it out."
                )
            found |= {_plain(tied) for tied in self._tied[f"{name}.weight"]}
        return found

    def _read(self, lora: str) -> dict[str, _Update]:
        """A LoRA adapter's updates by the names of the base model's weights."""
        if os.path.isabs(lora) and not os.path.isdir(lora):
            raise ValueError(
                f"lora={lora!r} is no folder here; load the adapter by PeftModel.from_pretrained, which takes the "
                "copy in its own folder, or name that one in its adapter_config.json."
            )
        config = PeftConfig.from_pretrained(lora)
        check_mergeable(config, lora)
        assert isinstance(config, LoraConfig)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_peft_weights(lora, device="cpu").items():
            name, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
            if kind not in ("A.weight", "B.weight"):
                raise ValueError(f"lora={lora!r} holds {key}, which is no part of a plain LoRA; {MERGE_IT}.")
            parts.setdefault(name, {})[kind[0]] = value
        modules = {_plain(name): module for name, module in self._model.named_modules()}
        linears = (name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D | DLQATLayer))
        lacking = sorted({name for name in linears if is_target(config, name)} - parts.keys())  # type: ignore[arg-type]
        if lacking or not parts:
            raise ValueError(
                f"lora={lora!r} lacks A and B of {folded(lacking) or 'all layers'}, which its config names; copy or "
                "download it again."
            )
        return {f"{name}.weight": self._update(name, modules, config, lora, **both) for name, both in parts.items()}

    def _update(
        self, name: str, modules: dict[str, nn.Module], config: LoraConfig, lora: str, **both: torch.Tensor
    ) -> _Update:
        module: Any = modules.get(name)
        module = module.get_base_layer() if isinstance(module, DLQATLayer) else module
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"lora={lora!r} adapts {name}, which is {'no module' if module is None else type(module).__name__} "
                "here, and must be a linear layer; load the base model that it was trained on."
            )
        if len(self._tied.get(f"{name}.weight", ())) > 1:
            raise ValueError(f"lora={lora!r} adapts {name}, whose weight another module uses as it is; {MERGE_IT}.")
        shape = [list(both.get(key, torch.empty(0)).shape) for key in "AB"]
        (out_features, in_features), r = out_in(module), shape[0][0]
        if shape != [[r, in_features], [out_features, r]]:
            raise ValueError(
                f"lora={lora!r} has A and B of {shape} for {name}, whose weight is [{out_features}, {in_features}]; "
                "load the base model that it was trained on."
            )
        if not all(torch.isfinite(tensor).all() for tensor in both.values()):
            raise ValueError(f"lora={lora!r} holds NaN or infinity for {name}; load its last good checkpoint.")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        return _Update(both["A"], both["B"], scaling, isinstance(module, Conv1D))


def _plain(name: str) -> str:
    """A name of the base model, without what PEFT has put around a module."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))
