"""How much memory a training step takes, found without allocating it.

What stays is counted on the meta device. What comes and goes is found by running a step on tensors without data, and
adding up what is alive after each operation. All of it is linear in the decoder layers, so that a model with few of
them tells it of any number.
"""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..config import DLQATConfig
from ..layer import adapter_layers
from ..packing import pack_weights
from ..quant.quantizer import piece_rows

# Bytes of optimiser state a trained number, beside the number and its gradient.
OPTIMIZER_BYTES = {"adamw": 8, "adamw_fused": 8, "adamw_8bit": 2, "sgd": 0}
# Bytes a weight of the piece of rows that the reference op works on. On the way to w_hat: float32 codes, where it is
# not made in its own place; and W0 in float32, or its bits unpacked.
_CODES_BYTES, _FLOAT_BYTES, _UNPACKED_BYTES = 4, 4, 5
# Once w_hat is gone: dL/dw_hat, and all on the way from there to the gradients of its tensors; of s alone, without BA.
_GRADIENTS_BYTES, _GRADIENTS_BYTES_OF_S = 16, 12
DEVICES = ("cuda", "cpu")
# Decoder layers of the two models whose difference is one layer.
_FEW = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step takes at its highest point, by what they are for.

    Attributes:
        frozen: W0 of the adapted layers, as it is stored.
        grid: s, z or b, and what they mean.
        rest: all else of the model: embeddings, norms, head, biases, buffers.
        adapter: A, B, m and other trained tensors.
        gradients: of the trained tensors.
        optimizer: the optimiser's state.
        accumulated: gradients of the batches before, where several make a step.
        update: beside state and gradients while the optimiser steps.
        activations: kept by the decoder layers from forward for backward.
        head: beside these while the head and the loss run: logits, their float32 copy, their gradient.
        temporaries: beside these while a decoder layer's backward runs: what it computes again, gradients of
            activations, w_hat and the pieces that it is made of.
    """

    frozen: int
    grid: int
    rest: int
    adapter: int
    gradients: int
    optimizer: int
    accumulated: int
    update: int
    activations: int
    head: int
    temporaries: int

    @property
    def static(self) -> int:
        """What is there before the step."""
        return self.frozen + self.grid + self.rest + self.adapter + self.optimizer

    @property
    def total(self) -> int:
        """The highest point. Head and layers do not run at once, and gradients come as activations go."""
        step = self.accumulated + self.activations + max(self.head, self.temporaries)
        return self.static + max(self.gradients + self.update, step)

    def __str__(self) -> str:
        """A line a part, in GiB."""
        parts = {**vars(self), "total": self.total}
        return "\n".join(f"{name:12} {size / 2**30:8.2f} GiB" for name, size in parts.items())


def estimate_memory(
    config: DLQATConfig,
    model: str | PretrainedConfig,
    batch_size: int,
    sequence_length: int,
    gradient_checkpointing: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: str = "adamw",
    device: str = "cuda",
    gradient_accumulation_steps: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of a training step of a causal language model, on one device.

    For batches without padding. The framework's own memory (a CUDA context, fragmentation) is not in it.

    Args:
        config: the adapter; its weights are taken as packed already (see `load_packed`).
        model: config of the model, or a hub id or folder with one.
        batch_size: sequences a step.
        sequence_length: tokens a sequence.
        gradient_checkpointing: whether decoder layers are computed again in backward.
        dtype: of the weights that are not packed, and of the computation.
        optimizer: "adamw" for torch's own, "adamw_fused" for that with `fused=True` (which the Trainer makes by
            default), "adamw_8bit" or "sgd".
        device: "cuda" or "cpu", which differ in how many rows the op works on at once, and in that torch's AdamW takes
            all tensors at once on a GPU. Triton's kernels take less than the plain torch that is reckoned with.
        gradient_accumulation_steps: batches that make a step of the optimiser.

    Returns:
        A [`MemoryEstimate`].

    Raises:
        ValueError: for an unknown optimiser or device, another task, or sizes below 1.

    Example:
        ```py
        >>> print(estimate_memory(DLQATConfig(bits=3, storage="int4"), "meta-llama/Llama-2-7b-hf", 1, 1024))
        ```
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(f"optimizer={optimizer!r} must be one of {', '.join(map(repr, OPTIMIZER_BYTES))}.")
    for name, value in (
        ("batch_size", batch_size),
        ("sequence_length", sequence_length),
        ("gradient_accumulation_steps", gradient_accumulation_steps),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")
    if device not in DEVICES:
        raise ValueError(f"device={device!r} must be one of {', '.join(map(repr, DEVICES))}.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type={config.task_type!r}: only causal language models can be estimated.")
    model_config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model
    layers = model_config.num_hidden_layers
    accumulates = gradient_accumulation_steps > 1

    def parts_of(count: int) -> dict[str, int]:
        model = _on_meta(config, _shortened(model_config, count), dtype)
        pack_weights(model)
        static = _static(model, optimizer)
        return {**static, **_step(model, batch_size, sequence_length, gradient_checkpointing, device, accumulates)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model itself will warn
        if _layers_alike(_on_meta(config, model_config, dtype), layers):
            few, one_more = parts_of(_FEW), parts_of(_FEW + 1)
            parts = {name: few[name] + (layers - _FEW) * (one_more[name] - few[name]) for name in few}
        else:
            parts = parts_of(layers)
    return MemoryEstimate(
        **parts,
        accumulated=parts["gradients"] if accumulates else 0,
        # The square root of the second moments.
        update=parts["adapter"] if optimizer == "adamw" and device == "cuda" else 0,
    )


def _layers_alike(model: PeftModel, count: int) -> bool:
    """Whether all decoder layers hold tensors of the same names and sizes, so that one stands for another."""
    by_layer: dict[str, dict[str, int]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if found := re.search(r"\.(\d+)\.", name):
            by_layer.setdefault(found[1], {})[name[found.end() :]] = tensor.nbytes
    kinds = list(by_layer.values())
    return len(kinds) == count and all(kind == kinds[0] for kind in kinds)


def _shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    short = copy.deepcopy(config)
    short.num_hidden_layers, short.use_cache = layers, False
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:layers]
    return short


def _on_meta(config: DLQATConfig, model_config: PretrainedConfig, dtype: torch.dtype) -> PeftModel:
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=True):
        base = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    base.tie_weights()
    return get_peft_model(base, config, low_cpu_mem_usage=True)


def _static(model: PeftModel, optimizer: str) -> dict[str, int]:
    layers = adapter_layers(model)[1].values()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = {
        "frozen": sum(layer.weight.nbytes for layer in layers),
        "grid": sum(buffer.nbytes for name, buffer in model.named_buffers() if ".dlqat_" in name),
        "adapter": sum(parameter.nbytes for parameter in trained),
    }
    everything = sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    numbers = sum(parameter.numel() for parameter in trained)
    return {
        **sizes,
        "rest": everything - sum(sizes.values()),
        "gradients": sizes["adapter"],
        "optimizer": OPTIMIZER_BYTES[optimizer] * numbers,
    }


def _step(
    model: PeftModel, batch: int, length: int, checkpointing: bool, device: str, accumulates: bool
) -> dict[str, int]:
    """Bytes alive in one step: after the decoder layers' forward, and above that at most in head and layers."""
    with FakeTensorMode():
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")).train()
        model.get_base_model().tie_weights()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            if accumulates and parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        ids = torch.empty(batch, length, dtype=torch.long, device="cpu")
        decoder = model.get_base_model().get_decoder()
        with _Alive(device) as alive:

            def end_of_layers(_: Any, __: Any, output: Any) -> None:
                alive.mark("activations")
                output[0].register_hook(lambda _: alive.mark("head"))

            hook = decoder.register_forward_hook(end_of_layers)
            model(input_ids=ids, labels=ids).loss.backward()
            hook.remove()
            alive.mark("temporaries")
    kept = alive.now["activations"]
    return {
        "activations": kept,
        "head": alive.highest["head"] - kept,
        "temporaries": max(alive.highest["temporaries"], alive.highest["activations"]) - kept,
    }


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations have made and that are still alive.

    Attributes:
        now: bytes alive when a mark was set.
        highest: most bytes alive between the mark before and this one.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._bytes = self._peak = 0
        self.now: dict[str, int] = {}
        self.highest: dict[str, int] = {}

    def mark(self, name: str) -> None:
        self.now[name], self.highest[name] = self._bytes, self._peak
        self._peak = self._bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        before = self._bytes
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        inside = self._inside(func, args)
        self._peak = max(self._peak, self._bytes, before + inside)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            del self._storages[key]
            self._bytes -= size

        self._storages[key] = weakref.ref(storage, gone)
        self._bytes += size

    def _inside(self, func: Any, args: Any) -> int:
        """Temporaries of our own op, which no operation shows."""
        if func.namespace != "peft_dlqat":
            return 0
        backward = "backward" in func.name()
        names = [argument.name for argument in func._schema.arguments]
        x, weight, A, B, gradient = (args[names.index(name)] for name in ("x", "weight", "A", "B", "gradient"))
        size, in_features, out_features = x.element_size(), A.shape[1], len(B)
        piece = min(out_features, piece_rows(in_features, self._device)) * in_features
        # What is made of w_hat is not there yet while w_hat is made.
        w_hat = out_features * in_features * size
        made = x.numel() * size if backward else x.numel() // in_features * out_features * size
        bytes_of_piece = 0 if x.dtype == torch.float32 else _CODES_BYTES
        if not weight.is_floating_point():
            bytes_of_piece += _UNPACKED_BYTES
        elif weight.dtype != torch.float32:
            bytes_of_piece += _FLOAT_BYTES
        inside = w_hat + max(bytes_of_piece * piece, made)
        if backward and gradient != "lowrank":
            inside = max(inside, made + (_GRADIENTS_BYTES if len(A) else _GRADIENTS_BYTES_OF_S) * piece)
        return inside
