"""Every input that the package refuses: how it is given, what is said, and what must not be touched.

`test_bad_input.py` runs each case. This file also writes docs/errors.md from the messages that are really raised:

    PYTHONPATH=src python tests/bad_input.py
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import disk_offload
from conftest import CONFIGS, HIDDEN, VOCAB, lm_batches, perturb, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load, save
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from peft_dlqat import (
    DistillationLoss,
    DLQATConfig,
    TeacherCache,
    calibrate,
    estimate_memory,
    export_model,
    load_packed,
    verify_export,
)
from peft_dlqat.layer import DLQATLayer
from peft_dlqat.train.calibrate import Calibration

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
REGENERATE = "PYTHONPATH=src python tests/bad_input.py"
NAN, INF = float("nan"), float("inf")


@dataclass
class Attempt:
    """A bad call, and the model that it must leave alone (None where there is none yet)."""

    call: Callable[[], object]
    model: nn.Module | None = None


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        section: heading in docs/errors.md.
        input: the input, as docs/errors.md shows it; also names the test.
        attempt: prepares the attempt; what it writes to disk goes into the given folder.
        error: type of the error.
        says: what the message must contain: the value, the rule, the remedy.
        keeps_model: False where PEFT has put the adapter in before its file is read, so that it stays.
        listed: whether docs/errors.md shows it.
    """

    section: str
    input: str
    attempt: Callable[[Path], Attempt]
    error: type[Exception] | tuple[type[Exception], ...]
    says: tuple[str, ...]
    keeps_model: bool = True
    listed: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# What a refused call must leave as it was


@dataclass
class Snapshot:
    """Everything about a model, its folder and the random number generators that a refused call could change."""

    outputs: torch.Tensor | None
    modules: dict[str, type]
    tensors: dict[str, torch.Tensor]
    trained: set[str]
    training: dict[str, bool]
    merged: dict[str, list[str]]
    adapters: list[str]
    random: tuple[Any, ...]
    files: dict[Path, bytes]


def outputs(model: nn.Module) -> torch.Tensor:
    """Logits in eval mode, NaN turned into a number so that equal means equal; none of a half-loaded adapter."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return torch.empty(0)
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        result = model.eval()(input_ids=tokens(batch=2)).logits
    for module, mode in modes.items():
        module.training = mode
    return result.nan_to_num(nan=12345.0)


def snapshot(model: nn.Module | None, folder: Path) -> Snapshot:
    """Looks at a model and a folder."""
    generators = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    if model is None:
        return Snapshot(None, {}, {}, set(), {}, {}, [], generators, files)
    seen = Snapshot(
        outputs=outputs(model),
        modules={name: type(module) for name, module in model.named_modules()},
        tensors={name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        trained={name for name, parameter in model.named_parameters() if parameter.requires_grad},
        training={name: module.training for name, module in model.named_modules()},
        merged={n: list(layer.merged_adapters) for n, layer in model.named_modules() if isinstance(layer, DLQATLayer)},
        adapters=sorted(getattr(model, "peft_config", {})),
        random=generators,
        files=files,
    )
    torch.set_rng_state(generators[0])
    return seen


def harm(before: Snapshot, after: Snapshot, generators: bool = True) -> list[str]:
    """What differs, in words; of the random number generators only if asked."""
    found = []
    if before.outputs is not None and not torch.equal(before.outputs, after.outputs):
        found.append("the logits")
    for name in ("modules", "trained", "training", "merged", "adapters", "files"):
        if getattr(before, name) != getattr(after, name):
            found.append(f"{name}: {getattr(before, name)} -> {getattr(after, name)}"[:300])
    if before.tensors.keys() != after.tensors.keys():
        found.append(f"names of the tensors: {sorted(before.tensors.keys() ^ after.tensors.keys())}"[:300])
    else:
        found += [name for name, t in before.tensors.items() if not same_bits(t, after.tensors[name])]
    if generators and not torch.equal(before.random[0], after.random[0]):
        found.append("torch's random number generator")
    if generators and str(before.random[1:]) != str(after.random[1:]):
        found.append("NumPy's or Python's random number generator")
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Net(nn.Module):
    """Token ids -> embedding -> `first` -> `second` -> logits, with whatever layer a case wants for `second`."""

    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 32)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32) if second is None else second

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        logits = self.second(torch.tanh(self.first(self.embedding(input_ids))))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten() % logits.shape[-1])
        return SimpleNamespace(logits=logits, loss=loss)


class ImageNet(nn.Module):
    """A model with a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.out = nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        image = input_ids[:, None, None].float().expand(-1, -1, 3, -1)
        return SimpleNamespace(logits=self.out(self.conv(image).mean((2, 3))))


class Int8Params(nn.Parameter):
    """As bitsandbytes' `Int8Params`: int8 data and its statistics."""

    def __new__(cls, data: torch.Tensor) -> Int8Params:
        parameter = torch.Tensor._make_subclass(cls, data, False)
        parameter.SCB = torch.ones(data.shape[0])
        return parameter


class Params4bit(nn.Parameter):
    """As bitsandbytes' `Params4bit`: two codes a byte, packed to [n, 1], in the bytes of `quant_storage`."""

    def __new__(cls, codes: torch.Tensor, quant_storage: torch.dtype) -> Params4bit:
        parameter = torch.Tensor._make_subclass(cls, codes.view(quant_storage).view(-1, 1), False)
        parameter.quant_state = SimpleNamespace(shape=(32, 32))
        return parameter


class Linear8bitLt(nn.Linear):
    """As bitsandbytes' 8-bit layer: an `nn.Linear` whose weight is int8."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.weight = Int8Params(torch.ones(32, 32, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) / 127, self.bias)


class Linear4bit(nn.Linear):
    """As bitsandbytes' 4-bit layer: an `nn.Linear` whose weight is packed."""

    def __init__(self, quant_storage: torch.dtype) -> None:
        super().__init__(32, 32)
        self.weight = Params4bit(torch.zeros(512, dtype=torch.uint8), quant_storage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.view(torch.uint8).float().mean() + self.bias


class QuantLinear(nn.Module):
    """As GPTQ's and AWQ's layers: packed `qweight`, no `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 32
        self.register_buffer("qweight", torch.ones(4, 32, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scales


class HQQLinear(nn.Module):
    """As HQQ's layer: packed `W_q`, no `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 32
        self.W_q = nn.Parameter(torch.ones(16, 32, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.W_q.float().mean()


class AffineQuantizedTensor(torch.Tensor):
    """As torchao's tensors: claims float32 and [32, 32], holds int8 and a scale."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> AffineQuantizedTensor:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("detach", "clone", "alias"):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        plain = [a.codes * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def torchao_linear() -> nn.Linear:
    """As after torchao's `quantize_`: a plain `nn.Linear` with a tensor subclass for its weight."""
    layer = nn.Linear(32, 32)
    weight = AffineQuantizedTensor(torch.ones(32, 32, dtype=torch.int8), torch.tensor(0.01))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes 8-bit": Linear8bitLt,
    "bitsandbytes 4-bit": lambda: Linear4bit(torch.uint8),
    "bitsandbytes 4-bit, quant_storage=bfloat16": lambda: Linear4bit(torch.bfloat16),
    "GPTQ or AWQ": QuantLinear,
    "HQQ": HQQLinear,
    "torchao": torchao_linear,
}


def small_config(**settings: Any) -> DLQATConfig:
    """A valid config, but for the given settings."""
    return DLQATConfig(**{"group_size": 32, "r": 4, "init": "minmax", **settings})


def net_config(**settings: Any) -> DLQATConfig:
    """The same for `Net`."""
    return small_config(**{"target_modules": ["first", "second"], **settings})


def adapted(zero_point: str = "integer") -> PeftModel:
    """A tiny Llama with an adapter that has been moved, as training would."""
    model = get_peft_model(
        tiny_model(),
        small_config(zero_point=zero_point, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    perturb(model)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Saved adapters, good and bad


@cache
def saved_files(zero_point: str = "integer") -> dict[str, bytes]:
    """The files of a good adapter."""
    with tempfile.TemporaryDirectory() as folder:
        adapted(zero_point).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


LOADING_SECTION = "Loading a saved adapter"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Files = dict[str, bytes]


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Files], None]:
    """A change of the tensors."""

    def change(files: Files) -> None:
        tensors = load(files[WEIGHTS])
        edit(tensors)
        files[WEIGHTS] = save(tensors, metadata={"format": "pt"})

    return change


def set_entry(kind: str, value: float, position: int = 0) -> Callable[[Files], None]:
    """A change of one number in the first tensor of a kind."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first_key(tensors, kind)].view(-1)[position] = value

    return edit_tensors(edit)


def first_key(tensors: dict[str, torch.Tensor], kind: str) -> str:
    return min(key for key in tensors if key.endswith(kind))


def edit_config(**settings: Any) -> Callable[[Files], None]:
    """A change of adapter_config.json."""

    def change(files: Files) -> None:
        files[CONFIG] = json.dumps({**json.loads(files[CONFIG]), **settings}).encode()

    return change


def truncate(files: Files) -> None:
    files[WEIGHTS] = files[WEIGHTS][: len(files[WEIGHTS]) // 2]


def truncate_header(files: Files) -> None:
    files[WEIGHTS] = files[WEIGHTS][:100]


def flip_header(files: Files) -> None:
    """Flips all bits of twenty bytes in the header."""
    files[WEIGHTS] = bytes(byte ^ 0xFF if 20 <= i < 40 else byte for i, byte in enumerate(files[WEIGHTS]))


def flip_header_length(files: Files) -> None:
    files[WEIGHTS] = struct.pack("<Q", 2**40) + files[WEIGHTS][8:]


def delete_tensor(kind: str) -> Callable[[Files], None]:
    return edit_tensors(lambda tensors: tensors.pop(first_key(tensors, kind)))


def add_tensor(name: str) -> Callable[[Files], None]:
    return edit_tensors(lambda tensors: tensors.update({f"base_model.model.{name}": torch.zeros(HIDDEN, HIDDEN)}))


def cast_tensor(kind: str, dtype: torch.dtype) -> Callable[[Files], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        key = first_key(tensors, kind)
        tensors[key] = tensors[key].to(dtype)

    return edit_tensors(edit)


def shorter_layer() -> nn.Module:
    """A base model of another shape than the saved adapter's: intermediate size 96, not 128."""
    config = CONFIGS["llama"]()
    config.intermediate_size = 96
    return AutoModelForCausalLM.from_config(config).eval()


@dataclass(frozen=True)
class BadFile:
    """A saved adapter that must not be loaded.

    Attributes:
        input: in words.
        change: what is done to the files of a good one.
        says: as in `Case`.
        zero_point: of the good one.
        base: the base model that it is loaded on.
        in_config: the fault is in adapter_config.json, which is not read where the adapter exists already.
        unreadable: safetensors itself refuses the file.
    """

    input: str
    change: Callable[[Files], None]
    says: tuple[str, ...]
    zero_point: str = "integer"
    base: Callable[[], nn.Module] = tiny_model
    in_config: bool = False
    unreadable: bool = False


DOWN = "down_proj.dlqat_"
BAD_FILES = [
    BadFile("truncated in the middle", truncate, ("header",), unreadable=True),
    BadFile("truncated in the header", truncate_header, ("header",), unreadable=True),
    BadFile("empty", lambda files: files.update({WEIGHTS: b""}), ("header",), unreadable=True),
    BadFile("bytes flipped in the header", flip_header, ("header",), unreadable=True),
    BadFile("length of the header changed", flip_header_length, ("header",), unreadable=True),
    BadFile("NaN in a scale", set_entry("dlqat_scale", NAN), (f"{DOWN}scale", "NaN", "broken")),
    BadFile("infinity in A", set_entry("dlqat_A", INF), (f"{DOWN}A", "infinity", "broken")),
    BadFile(
        "NaN in a scale, bfloat16 model",
        set_entry("dlqat_scale", NAN),
        (f"{DOWN}scale", "NaN", "broken"),
        base=lambda: tiny_model(dtype=torch.bfloat16),
    ),
    BadFile("NaN in a magnitude", set_entry("dlqat_magnitude", NAN), (f"{DOWN}magnitude", "NaN", "broken")),
    BadFile("scale 0", set_entry("dlqat_scale", 0.0), (f"{DOWN}scale", "positive", "0.0", "broken")),
    BadFile(
        "scale 0, symmetric grid",
        set_entry("dlqat_scale", 0.0),
        (f"{DOWN}scale", "non-zero", "0.0:"),
        zero_point="none",
    ),
    BadFile("negative scale", set_entry("dlqat_scale", -1.0), (f"{DOWN}scale", "positive", "-1.0", "broken")),
    BadFile("negative scale, float offset", set_entry("dlqat_scale", -1.0), ("positive", "-1.0"), zero_point="float"),
    BadFile("zero point 0.5", set_entry("dlqat_zero_point", 0.5), (f"{DOWN}zero_point", "0.5", "integers", "-8 to 7")),
    BadFile("zero point 99", set_entry("dlqat_zero_point", 99.0), (f"{DOWN}zero_point", "99.0", "-8 to 7", "broken")),
    BadFile("a missing tensor", delete_tensor("dlqat_B"), ("missing", f"{DOWN}B", "adapter_config.json")),
    BadFile("a missing spec", delete_tensor("dlqat_spec"), ("missing", f"{DOWN}spec", "adapter_config.json")),
    BadFile(
        "tensors of a layer that is not adapted",
        add_tensor("model.layers.0.self_attn.k_proj.dlqat_A"),
        ("unexpected", "k_proj.dlqat_A", "adapter_config.json"),
    ),
    BadFile(
        "a tensor of no layer",
        add_tensor("model.layers.9.mlp.weight"),
        ("unexpected", "layers.9"),
    ),
    BadFile(
        "a base weight",
        add_tensor("model.layers.0.self_attn.q_proj.base_layer.weight"),
        ("unexpected", "q_proj.base_layer.weight"),
    ),
    BadFile(
        "integers in A",
        cast_tensor("dlqat_A", torch.int64),
        (f"{DOWN}A", "int64", "float"),
    ),
    BadFile("spec says 3 bits, config 4", set_entry("dlqat_spec", 3.0), ("bits: 3 in the file, 4 here", "beside it")),
    BadFile("saved in an older format", set_entry("dlqat_spec", 1.0, -1), ("format: 1 in the file, 2 here",)),
    BadFile("NaN in the spec", set_entry("dlqat_spec", NAN), ("dlqat_spec", "NaN")),
    BadFile("config edited: bits", edit_config(bits=3), ("bits: 4 in the file, 3 here", "beside it"), in_config=True),
    BadFile("config edited: lora_alpha", edit_config(lora_alpha=4), ("lora scaling", "2 in the file"), in_config=True),
    BadFile(
        "config edited: scale_dtype", edit_config(scale_dtype="float32"), ("'bfloat16' in the file",), in_config=True
    ),
    BadFile("config edited: zero_point", edit_config(zero_point="none"), ("unexpected", "zero_point"), in_config=True),
    BadFile("config edited: r", edit_config(r=8), ("shapes", "not [8, "), in_config=True),
    BadFile("config edited: group_size", edit_config(group_size=16), ("shapes", "not [64, 4]"), in_config=True),
    BadFile("config edited: bits=1", edit_config(bits=1), ("bits=1", "2 to 8", "use 4"), in_config=True),
    BadFile("config is no JSON", lambda f: f.update({CONFIG: f[CONFIG][:50]}), (), in_config=True, unreadable=True),
    BadFile(
        "base model of another shape",
        lambda files: None,
        ("shapes", "[4, 128], not [4, 96]", "base model that it was trained on"),
        base=shorter_layer,
    ),
]


def existing(base: Callable[[], nn.Module], zero_point: str) -> PeftModel:
    """A model that has one adapter already, on which the bad one is to be loaded."""
    model = get_peft_model(
        base(), small_config(zero_point=zero_point, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    perturb(model, seed=1)
    return model.eval()


def _from_pretrained(bad: BadFile, folder: Path, **kwargs: Any) -> Attempt:
    model = bad.base()
    return Attempt(lambda: PeftModel.from_pretrained(model, str(folder), **kwargs), model)


def _load_adapter(bad: BadFile, folder: Path, name: str, **kwargs: Any) -> Attempt:
    model = existing(bad.base, bad.zero_point)
    return Attempt(lambda: model.load_adapter(str(folder), name, **kwargs), model)


WAYS: dict[str, Callable[[BadFile, Path], Attempt]] = {
    "from_pretrained": _from_pretrained,
    "from_pretrained, low_cpu_mem_usage": lambda bad, f: _from_pretrained(bad, f, low_cpu_mem_usage=True),
    "load_adapter": lambda bad, f: _load_adapter(bad, f, "second"),
    "load_adapter, low_cpu_mem_usage": lambda bad, f: _load_adapter(bad, f, "second", low_cpu_mem_usage=True),
    "load_adapter over the same": lambda bad, f: _load_adapter(bad, f, "default"),
}


def write_bad_file(bad: BadFile, folder: Path) -> Path:
    """Writes the bad adapter; returns its folder."""
    files = dict(saved_files(bad.zero_point))
    bad.change(files)
    target = folder / "adapter"
    target.mkdir()
    for name, content in files.items():
        (target / name).write_bytes(content)
    return target


def loading_case(bad: BadFile, way: str) -> Case:
    """A bad file loaded in one of the ways."""
    errors: tuple[type[Exception], ...] = (ValueError, SafetensorError) if bad.unreadable else (ValueError,)
    return Case(
        section=LOADING_SECTION,
        input=bad.input if way == "from_pretrained" else f"{bad.input} ({way})",
        attempt=lambda folder: WAYS[way](bad, write_bad_file(bad, folder)),
        error=errors,
        says=bad.says,
        keeps_model=way == "load_adapter over the same",
        listed=way == "from_pretrained",
    )


def loading_cases() -> Iterator[tuple[BadFile, str, Case]]:
    """Every bad file in every way that reads the part that is bad."""
    for bad in BAD_FILES:
        for way in WAYS:
            if way == "load_adapter over the same" and (bad.in_config or bad.base is shorter_layer):
                continue  # adapter_config.json is not read; the adapter is of the base's own shape
            yield bad, way, loading_case(bad, way)


# ---------------------------------------------------------------------------------------------------------------------
# Configs


def refused_config(error: type[Exception] = ValueError, **settings: Any) -> Callable[..., Case]:
    """A config that is refused before there is a model."""
    shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())

    def attempt(_: Path) -> Attempt:
        return Attempt(lambda: DLQATConfig(**settings))

    return lambda *says: Case("Config", f"DLQATConfig({shown})", attempt, error, says)


BITS_RULE = ("must be an integer from 2 to 8", "use 4")
GROUP_RULE = ("must be an integer of at least 1", "-1 for one scale a row")
CONFIG_CASES = [
    *(refused_config(bits=value)(f"bits={value!r}", *BITS_RULE) for value in (1, 9, 0, -4, 3.5, 4.0, "3", True, None)),
    *(
        refused_config(group_size=value)(f"group_size={value!r}", *GROUP_RULE)
        for value in (0, -2, 64.0, -1.0, "64", True)
    ),
    *(refused_config(r=value)(f"r={value!r}", "at least 1", "use 8") for value in (0, -1, 4.0, True)),
    *(
        refused_config(lora_alpha=value)(f"lora_alpha={value!r}", "positive number", "use r")
        for value in (0, -16, NAN, INF, "16", True)
    ),
    *(
        refused_config(zero_point=value)(f"zero_point={value!r}", "'none', 'integer', 'float'")
        for value in ("asymmetric", None, True)
    ),
    *(
        refused_config(scale_dtype=value)(f"scale_dtype={value!r}", "'bfloat16', 'float16', 'float32'")
        for value in ("int8", torch.bfloat16)
    ),
    *(
        refused_config(scale_dtype="k_quant", **settings)(*says, "none of GGUF's K-quants", "(Q3_K)", "'bfloat16'")
        for settings, says in (
            ({}, ("bits=4, zero_point='integer', group_size=128",)),
            ({"bits": 3, "zero_point": "none"}, ("bits=3, zero_point='none', group_size=128",)),
            ({"bits": 8, "zero_point": "none", "group_size": 16}, ("bits=8",)),
        )
    ),
    refused_config(method="lora")("method='lora'", "'dlqat', 'lrqat', 'l4q', 'peqa', 'qalora'"),
    refused_config(method=None)("method=None", "'dlqat'"),
    refused_config(magnitude="column")("magnitude='column'", "'group', 'row', 'none'"),
    refused_config(magnitude=1)("magnitude=1", "'group', 'row', 'none'"),
    refused_config(method="peqa", magnitude=False)("magnitude=False", "method='peqa'", "leave it at True"),
    refused_config(method="qalora", zero_point="integer")("zero_point='integer'", "method='qalora'", "use 'float'"),
    refused_config(init="gptq")("init='gptq'", "'mse', 'minmax'"),
    refused_config(export="gguf")("export='gguf'", "list of formats", "['gguf']"),
    refused_config(export=["ggml"])("export='ggml'", "'compressed-tensors', 'gguf', 'mlx', 'gptq', 'dense'"),
    refused_config(export=["gguf", "compressed-tensors"], zero_point="float")(
        "compressed-tensors cannot hold bits=4, group_size=128, zero_point='float'", "use zero_point='integer'"
    ),
    refused_config(export=["gguf"], bits=3, group_size=16)("gguf cannot hold", "group_size=16", "use group_size=32"),
    refused_config(export=["gguf"], scale_dtype="float32")("scale_dtype='float32'", "use scale_dtype='bfloat16'"),
    refused_config(export=["gguf"], bits_pattern={"down_proj": 8})("bits=8", "use zero_point='none' or bits=7"),
    refused_config(bias="lora_only")("bias='lora_only'", "'none', 'all', 'dlqat_only'"),
    refused_config(use_rslora="yes")("use_rslora='yes'", "True or False"),
    refused_config(init_weights="gaussian")("init_weights='gaussian'", "True or False"),
    refused_config(bits_pattern={"q_proj": 1})("bits_pattern['q_proj']=1", *BITS_RULE),
    refused_config(bits_pattern={"q_proj": "3"})("bits_pattern['q_proj']='3'", *BITS_RULE),
    refused_config(bits_pattern=[3])("bits_pattern=[3]", "dict"),
    refused_config(group_size_pattern={"q_proj": 0})("group_size_pattern['q_proj']=0", *GROUP_RULE),
    refused_config(rank_pattern={"q_proj": 0})("rank_pattern['q_proj']=0", "at least 1", "use 8"),
    refused_config(alpha_pattern={"q_proj": NAN})("alpha_pattern['q_proj']=nan", "positive number", "use r"),
    refused_config(error=TypeError, group=64)("unexpected keyword argument 'group'"),
    refused_config(target_modules=".*_proj", layers_to_transform=1)(
        "layers_to_transform=1", "regex", "'.*_proj'", "modules in a list"
    ),
    refused_config(layers_pattern="layers")("layers_pattern='layers'", "needs layers_to_transform"),
    refused_config(target_modules=5)("target_modules=5", "names"),
    refused_config(target_modules="(")("target_modules='('", "regex"),
    refused_config(bits_pattern={"(": 3})("bits_pattern", "'('"),
    refused_config(bits_pattern={0: 3})("bits_pattern", "0", "name"),
    refused_config(layers_to_transform="1")("layers_to_transform='1'", "index"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Injecting


def injecting(
    shown: str,
    model: Callable[[], nn.Module],
    config: Callable[[], DLQATConfig],
    error: type[Exception],
    *says: str,
) -> Case:
    """`get_peft_model` that is refused."""

    def attempt(_: Path) -> Attempt:
        base = model()
        return Attempt(lambda: get_peft_model(base, config()), base)

    return Case("Injecting", shown, attempt, error, says)


def with_entry(model: nn.Module, module: str, value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with one weight replaced by NaN or infinity."""
    model = model.to(dtype)
    model.get_submodule(module).weight.data[1, 2] = value
    return model


def second_adapter(_: Path) -> Attempt:
    model = adapted()
    return Attempt(lambda: model.add_adapter("second", small_config(group_size=256)), model)


def transformers_adapter(_: Path) -> Attempt:
    model = tiny_model()
    return Attempt(lambda: model.add_adapter(small_config(group_size=256)), model)


def k_quant_config(**kwargs: Any) -> DLQATConfig:
    return small_config(bits=3, zero_point="none", group_size=16, scale_dtype="k_quant", **kwargs)


LARGE_GROUP = ("group_size=256 is larger than in_features=64", "use at most 64", "-1 for one scale a row")


def narrow() -> nn.Module:
    """A Llama whose in_features are 48, no multiple of 32."""
    config = CONFIGS["llama"]()
    config.hidden_size, config.head_dim = 48, 12
    return AutoModelForCausalLM.from_config(config).eval()


INJECTING_CASES = [
    injecting(
        "group_size=256 on in_features=64", tiny_model, lambda: small_config(group_size=256), ValueError, *LARGE_GROUP
    ),
    injecting(
        "group_size_pattern={'q_proj': 256} on in_features=64",
        tiny_model,
        lambda: small_config(group_size_pattern={"q_proj": 256}),
        ValueError,
        *LARGE_GROUP,
    ),
    injecting(
        "scale_dtype='k_quant' on in_features=64",
        tiny_model,
        k_quant_config,
        ValueError,
        "in_features=64 of model.layers.0.self_attn.q_proj is not a multiple of 256",
        "exclude_modules",
        "scale_dtype='bfloat16'",
    ),
    injecting(
        "scale_dtype='k_quant' with bits_pattern={'down_proj': 4}",
        lambda: tiny_model("wide llama"),
        lambda: k_quant_config(bits_pattern={"down_proj": 4}),
        ValueError,
        "bits=4, zero_point='none', group_size=16 of model.layers.0.mlp.down_proj",
        "none of GGUF's K-quants",
    ),
    injecting(
        "export=['gguf'] on in_features=48",
        narrow,
        lambda: small_config(group_size=-1, export=["gguf"]),
        ValueError,
        "q_proj: gguf cannot hold",
        "group_size=48",
        "leave the layer out",
    ),
    Case("Injecting", "a second adapter with group_size=256", second_adapter, ValueError, LARGE_GROUP),
    Case("Injecting", "transformers' add_adapter with group_size=256", transformers_adapter, ValueError, LARGE_GROUP),
    injecting(
        "target_modules=['query']: matches nothing",
        tiny_model,
        lambda: small_config(target_modules=["query"]),
        ValueError,
        "Target modules {'query'} not found",
        "check the target modules",
    ),
    injecting(
        "target_modules=[]",
        tiny_model,
        lambda: small_config(target_modules=[]),
        ValueError,
        "target_modules",
        "check",
    ),
    injecting(
        "layers_to_transform=[7] of 2 layers",
        tiny_model,
        lambda: small_config(layers_to_transform=[7]),
        ValueError,
        "layers_to_transform",
        "[7]",
    ),
    injecting(
        "target_modules=['embed_tokens']: an Embedding",
        tiny_model,
        lambda: small_config(target_modules=["q_proj", "embed_tokens"]),
        ValueError,
        "embed_tokens is a",
        "Embedding",
        "torch.nn.Linear",
        "exclude_modules",
    ),
    injecting(
        "target_modules='.*(q_proj|embed_tokens)': a regex that matches an Embedding",
        tiny_model,
        lambda: small_config(target_modules=".*(q_proj|embed_tokens)"),
        ValueError,
        "embed_tokens is a",
        "Embedding",
        "exclude_modules",
    ),
    injecting(
        "target_modules=['conv']: a Conv2d",
        ImageNet,
        lambda: small_config(target_modules=["out", "conv"], group_size=1),
        ValueError,
        "conv is a",
        "Conv2d",
        "torch.nn.Linear",
        "exclude_modules",
    ),
    *(
        injecting(
            f"{value} in a weight, {str(dtype).removeprefix('torch.')} model",
            lambda value=value, dtype=dtype: with_entry(tiny_model(), "model.layers.1.mlp.up_proj", value, dtype),
            small_config,
            ValueError,
            "model.layers.1.mlp.up_proj",
            "NaN or infinity",
            "exclude_modules",
        )
        for value in (NAN, INF, -INF)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
    injecting(
        "nan in a Conv1D's weight",
        lambda: with_entry(tiny_model("gpt2"), "transformer.h.1.mlp.c_fc", NAN),
        small_config,
        ValueError,
        "transformer.h.1.mlp.c_fc",
        "NaN or infinity",
        "exclude_modules",
    ),
    *(
        injecting(
            f"quantized base layer: {kind}",
            lambda make=make: Net(make()),
            net_config,
            TypeError,
            "cannot adapt second",
            "quantized already",
            "load the base model in bfloat16",
        )
        for kind, make in QUANTIZED.items()
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# Calibrating


def calibrating(
    shown: str, error: type[Exception], *says: str, loader: Callable[[], Any] = lm_batches, **kwargs: Any
) -> Case:
    """`calibrate` that is refused."""

    def attempt(_: Path) -> Attempt:
        model = adapted()
        batches = loader()
        return Attempt(lambda: calibrate(model, batches, **{"steps": 12, "progress": False, **kwargs}), model)

    return Case("Calibrating", shown, attempt, error, says)


def merged(_: Path) -> Attempt:
    model = adapted()
    model.merge_adapter()
    return Attempt(lambda: calibrate(model, lm_batches(), steps=2, progress=False), model)


def no_adapter(_: Path) -> Attempt:
    model = tiny_model()
    return Attempt(lambda: calibrate(model, lm_batches(), steps=2), model)


def poisoned(at: int, training: bool) -> Callable[[Path], Attempt]:
    """A model whose logits turn NaN at its `at`-th forward pass, drawing random numbers of all kinds on the way."""

    def attempt(_: Path) -> Attempt:
        model = adapted().train(training)
        model.base_model.model.model.norm.weight.requires_grad_(True)  # a flag that PEFT has not set
        calls = []

        def poison(module: nn.Module, inputs: Any, output: Any) -> Any:
            calls.append(1)
            if armed:
                torch.rand(1), np.random.rand(), random.random()
                output.logits = output.logits * (NAN if len(calls) >= at else 1.0)
            return output

        armed: list[int] = []

        def call() -> object:
            calls.clear()
            armed.append(1)
            try:
                return calibrate(model, lm_batches(), steps=6, lr=0.1, progress=False)
            finally:
                armed.clear()

        model.base_model.model.register_forward_hook(poison)
        return Attempt(call, model)

    return attempt


# A step of distillation is two forward passes, the teacher's and the model's. Before the first, on as many batches as
# there are steps, up to 8, the loss is measured (two passes); min-max grids are not fitted to the inputs.
BEFORE, MIDDLE = 1, 2 * 6 + 2 * 3 + 1
BATCH_RULE = ("must be a dict of the model's arguments", "'input_ids'")
CALIBRATING_CASES = [
    *(
        calibrating(f"steps={value!r}", ValueError, f"steps={value!r}", "non-negative integer", "0 only", steps=value)
        for value in (-1, 2.0, True)
    ),
    *(
        calibrating(f"lr={value!r}", ValueError, f"lr={value!r}", "must be", "positive", "the default is", lr=value)
        for value in (0, -1e-2, NAN)
    ),
    calibrating("objective='mse'", ValueError, "objective='mse'", "'distill', 'task'", objective="mse"),
    calibrating("by='layer'", ValueError, "by='layer'", "'model', 'blocks'", by="layer"),
    calibrating("adapter_name='other'", ValueError, "'other'", "the model has ['default']", adapter_name="other"),
    Case("Calibrating", "a model without an adapter", no_adapter, ValueError, ("no DL-QAT adapter", "get_peft_model")),
    Case("Calibrating", "a merged adapter", merged, ValueError, ("merged", "unmerge_adapter"), "merged"),
    calibrating("an empty loader", ValueError, "empty", "at least one batch", loader=list),
    calibrating("an empty generator", ValueError, "empty", "at least one batch", loader=lambda: iter(())),
    calibrating(
        "a generator of 3 batches for 12 steps",
        ValueError,
        "ended after 3 batches",
        "12 steps",
        "pass a DataLoader or a list, or steps=3",
        loader=lambda: iter(lm_batches(3)),
    ),
    calibrating(
        "a generator of 10 batches for 12 steps",  # ends after the grid has moved
        ValueError,
        "ended after 10 batches",
        "steps=10",
        loader=lambda: iter(lm_batches(10)),
        lr=0.1,
    ),
    *(
        calibrating(
            f"batches whose {what}",
            ValueError,
            "no position of the first 8 calibration batches counts",
            "labels are -100",
            loader=lambda key=key, value=value: [{"input_ids": tokens(), key: torch.full_like(tokens(), value)}] * 2,
        )
        for what, key, value in (
            ("labels are all -100", "labels", -100),
            ("attention_mask is all 0", "attention_mask", 0),
        )
    ),
    calibrating("batches that are tensors", ValueError, "is a Tensor", *BATCH_RULE, loader=lambda: [tokens()] * 2),
    calibrating("batches that are tuples", ValueError, "is a tuple", *BATCH_RULE, loader=lambda: [(tokens(),)] * 2),
    calibrating(
        "objective='task' without labels",
        ValueError,
        "no loss for objective='task'",
        "labels",
        "'distill'",
        loader=lambda: [{"input_ids": tokens()}] * 2,
        objective="task",
    ),
    Case(
        "Calibrating",
        "a loss that is NaN from the start",
        poisoned(BEFORE, training=False),
        FloatingPointError,
        ("nan before calibration", "put back", "heck the data"),
    ),
    Case(
        "Calibrating",
        "a loss that turns NaN",
        poisoned(MIDDLE, training=False),
        FloatingPointError,
        ("nan at calibration step 4 of 6", "put back", "Lower lr=0.1"),
    ),
    Case(
        "Calibrating",
        "a loss that turns NaN, model in training mode",
        poisoned(MIDDLE, training=True),
        FloatingPointError,
        ("nan at calibration step 4 of 6", "put back", "Lower lr=0.1"),
        listed=False,
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# Running and merging


def running(call: Callable[[PeftModel], object]) -> Callable[[Path], Attempt]:
    def attempt(_: Path) -> Attempt:
        model = adapted()
        return Attempt(lambda: call(model), model)

    return attempt


@cache
def _two_adapters() -> PeftModel:
    model = adapted()
    config = small_config(bits=3, zero_point="float", target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model.add_adapter("second", config)
    perturb(model, seed=2)
    return model.eval()


def both_active(call: Callable[[PeftModel], object]) -> Callable[[Path], Attempt]:
    """The same on a model with two active adapters."""

    def attempt(_: Path) -> Attempt:
        model = _two_adapters()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.base_model.set_adapter(["default", "second"])
        return Attempt(lambda: call(model), model)

    return attempt


def first_layer(model: nn.Module) -> DLQATLayer:
    return next(module for module in model.modules() if isinstance(module, DLQATLayer))


def quantized_later(kind: str, how: str) -> Callable[[Path], Attempt]:
    """A layer whose base is quantized after an adapter was put in, with another layer before it that is not."""

    def attempt(_: Path) -> Attempt:
        model = get_peft_model(Net(), net_config())
        perturb(model)
        layer = model.base_model.model.second
        layer.base_layer = QUANTIZED[kind]()
        # The layer itself can't run on this base, and need not.
        layer.forward = layer.base_layer.forward
        return Attempt(lambda: getattr(model, how)(), model)

    return attempt


def broken_later(how: str) -> Callable[[Path], Attempt]:
    """An adapter whose last layer holds NaN."""

    def attempt(_: Path) -> Attempt:
        model = adapted()
        *_, last = (module for module in model.modules() if isinstance(module, DLQATLayer))
        last.dlqat_magnitude["default"].data[0, 0] = NAN
        return Attempt(lambda: getattr(model, how)(safe_merge=True), model)

    return attempt


NAMES_RULE = ("adapter_names=", "not supported", "set_adapter")
NO_GRID = ("['default', 'second']", "no grid", "name one of")
RUNNING_CASES = [
    Case(
        "Running and merging",
        "adapter_names= in forward",
        running(lambda model: model(input_ids=tokens(), adapter_names=["default"] * 4)),
        ValueError,
        NAMES_RULE,
    ),
    Case(
        "Running and merging",
        "adapter_names= in generate",
        running(lambda model: model.generate(input_ids=tokens(), adapter_names=["default"] * 4, max_new_tokens=2)),
        ValueError,
        NAMES_RULE,
    ),
    Case(
        "Running and merging",
        "codes of two active adapters",
        both_active(lambda model: first_layer(model).quantized_weight()),
        ValueError,
        NO_GRID,
    ),
    Case(
        "Running and merging",
        "codes of an adapter that isn't there",
        running(lambda model: first_layer(model).quantized_weight("other")),
        ValueError,
        ("no such adapter", "name one of ['default']"),
    ),
    Case(
        "Running and merging",
        "calibrating with two active adapters",
        both_active(lambda model: calibrate(model, lm_batches(), steps=2, progress=False)),
        ValueError,
        ("2 adapters are active", "'second'", "adapter_name"),
    ),
    *(
        Case(
            "Running and merging",
            f"{how} into a quantized base layer: {kind}",
            quantized_later(kind, how),
            TypeError,
            ("cannot merge into", "quantized already", "load the base model in bfloat16"),
            listed=how == "merge_adapter",
        )
        for kind in QUANTIZED
        for how in ("merge_adapter", "merge_and_unload")
    ),
    *(
        Case(
            "Running and merging",
            f"{how}(safe_merge=True) of an adapter with NaN",
            broken_later(how),
            ValueError,
            ("NaNs detected in the merged weights", "The adapter default seems to be broken"),
        )
        for how in ("merge_adapter", "merge_and_unload")
    ),
]


def distilling(shown: str, *says: str, bias: str = "none", **kwargs: Any) -> Case:
    """A `DistillationLoss` that is refused."""

    def attempt(_: Path) -> Attempt:
        config = small_config(bias=bias, target_modules=["fc1"], task_type="CAUSAL_LM")
        student = get_peft_model(tiny_model("opt"), config)
        return Attempt(lambda: DistillationLoss(student, **kwargs), student)

    return Case("Distilling", shown, attempt, ValueError, says)


def caching(shown: str, *says: str, **kwargs: Any) -> Case:
    """A `TeacherCache` that is refused."""
    return Case("Distilling", shown, lambda _: Attempt(lambda: TeacherCache(**kwargs)), ValueError, says)


DISTILLING_CASES = [
    distilling("DistillationLoss(model, reverse=2)", "reverse=2", "from 0", "'confidence'", reverse=2),
    distilling("DistillationLoss(model, task_weight=-1)", "task_weight=-1", "0 or more", task_weight=-1),
    distilling(
        "DistillationLoss(model) of an adapter with bias='all'",
        *("train in place", "bias='none'", "cache.teacher(model, batch)"),
        bias="all",
    ),
    caching("TeacherCache(k=0)", "k=0", "positive integer", "64 is usual", k=0),
    caching("TeacherCache(max_bytes=0)", "max_bytes=0", "positive integer", "4 GiB", max_bytes=0),
]


# ---------------------------------------------------------------------------------------------------------------------
# Exporting


def exporting(
    shown: str,
    error: type[Exception],
    *says: str,
    make: Callable[[], nn.Module] = adapted,
    format: str = "dense",
    **kwargs: Any,
) -> Case:
    """`export_model` of a live model that is refused, without a trace on disk."""

    def attempt(folder: Path) -> Attempt:
        model = make()
        for config in getattr(model, "peft_config", {}).values():  # an uncalibrated adapter warns
            config.record.setdefault(
                "calibration", asdict(Calibration(0, "model", "distill", 1.0, 0.5, 0.5, "fitted"))
            )
        return Attempt(lambda: export_model(model, folder / "out", format, **kwargs), model)

    return Case("Exporting", shown, attempt, error, says)


def occupied(folder: Path) -> Attempt:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    model = adapted()
    return Attempt(lambda: export_model(model, folder / "out", "dense"), model)


def other_base(folder: Path) -> Attempt:
    """An adapter on disk, and a base model of the right shape that it was not trained on."""
    adapted().save_pretrained(str(folder / "adapter"))
    base = tiny_model()
    base.model.layers[0].self_attn.q_proj.weight.data += 0.01
    base.save_pretrained(folder / "base")
    return Attempt(lambda: export_model(folder / "adapter", folder / "out", "dense", base=folder / "base"))


def without_base(folder: Path) -> Attempt:
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = None
    model.base_model.model.name_or_path = None
    model.save_pretrained(str(folder / "adapter"))
    return Attempt(lambda: export_model(folder / "adapter", folder / "out", "dense"))


def lora_on_disk(folder: Path) -> Attempt:
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(folder / "adapter"))
    return Attempt(lambda: export_model(folder / "adapter", folder / "out", "dense", base=folder / "base"))


def without_package(folder: Path) -> Attempt:
    model = adapted()

    def call() -> object:
        find = importlib.util.find_spec
        with mock.patch("importlib.util.find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest)):
            return export_model(model, folder / "out", "gguf")

    return Attempt(call, model)


def tokenizer_of(tokens: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer, whose tokens are all there is to it."""
    vocabulary = {f"t{index}": index for index in range(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[])))


def gemma2() -> PeftModel:
    """Whose queries are scaled as no Gemma 2 of Google's is."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, query_pre_attn_scalar=64)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), small_config(task_type="CAUSAL_LM"))
    perturb(model)
    return model.eval()


def opt() -> PeftModel:
    model = get_peft_model(tiny_model("opt"), small_config(task_type="CAUSAL_LM"))
    perturb(model)
    return model.eval()


def with_tiny_scale() -> PeftModel:
    """A scale below the smallest float16."""
    model = adapted()
    first_layer(model).dlqat_scale["default"][0, 0] = 1e-9
    return model


def with_large_embedding() -> PeftModel:
    """A number above the largest float16."""
    model = adapted()
    model.get_input_embeddings().weight.data[0, 0] = 1e6
    return model


def both_adapters() -> PeftModel:
    model = _two_adapters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.base_model.set_adapter(["default", "second"])
    return model


EXPORTING_CASES = [
    exporting("format='ggml'", ValueError, "format='ggml'", "'gguf'", format="ggml"),
    exporting("dtype='int8'", ValueError, "dtype='int8'", "'bfloat16'", dtype="int8"),
    exporting("embeddings='q4_0'", ValueError, "embeddings='q4_0'", "'q8_0'", format="gguf", embeddings="q4_0"),
    exporting("push_to_hub=True without repo_id", ValueError, "needs repo_id", push_to_hub=True),
    exporting("base= beside a model", ValueError, "base='somewhere'", "adapter on disk", base="somewhere"),
    exporting("adapter_name='other'", ValueError, "'other'", "the model has ['default']", adapter_name="other"),
    exporting("a model without an adapter", ValueError, "no DL-QAT adapter", "get_peft_model", make=tiny_model),
    exporting("two active adapters", ValueError, "2 adapters are active", "adapter_name", make=both_adapters),
    exporting(
        "zero_point='float' to compressed-tensors",
        ValueError,
        "compressed-tensors cannot hold bits=4, group_size=32, zero_point='float'",
        "use zero_point='integer'",
        "lossy=True",
        make=lambda: adapted("float"),
        format="compressed-tensors",
    ),
    exporting(
        "a scale that float16 does not hold, to GGUF",
        ValueError,
        "has no exact float16",
        "scale_dtype='float16'",
        "lossy=True",
        make=with_tiny_scale,
        format="gguf",
    ),
    exporting(
        "dtype='float16' of a number that is too large for it",
        ValueError,
        "embed_tokens.weight: 1e+06",
        "float16",
        "pass dtype='bfloat16'",
        make=with_large_embedding,
        dtype="float16",
    ),
    exporting(
        "an architecture that GGUF is not written for",
        ValueError,
        "model_type='opt'",
        "'llama'",
        "'compressed-tensors'",
        make=opt,
        format="gguf",
    ),
    exporting(
        "a Gemma 2 that llama.cpp computes otherwise",
        ValueError,
        "query_pre_attn_scalar=64",
        "takes 16",
        "'compressed-tensors'",
        make=gemma2,
        format="gguf",
    ),
    exporting(
        "a tokenizer with more tokens than the embedding has rows, to GGUF",
        ValueError,
        f"{VOCAB + 1} tokens",
        f"{VOCAB} rows",
        "resize_token_embeddings",
        format="gguf",
        tokenizer=tokenizer_of(VOCAB + 1),
    ),
    exporting(
        "a base model that is no transformers model",
        TypeError,
        "the base model is a Net",
        "transformers",
        make=lambda: get_peft_model(Net(), net_config()),
    ),
    Case("Exporting", "an output folder that is not empty", occupied, FileExistsError, ("exists", "new folder")),
    Case(
        "Exporting",
        "another base model than the one trained on",
        other_base,
        ValueError,
        ("are not those that the adapter was trained on", "checksum", "base=..."),
    ),
    Case("Exporting", "an adapter that names no base model", without_base, ValueError, ("base model", "base=...")),
    Case("Exporting", "a LoRA adapter", lora_on_disk, ValueError, ("LORA", "only DL-QAT adapters")),
    Case(
        "Exporting",
        "gguf without its package",
        without_package,
        ImportError,
        ("needs the package gguf", "pip install 'peft-dlqat[gguf]'"),
    ),
    Case(
        "Exporting",
        "verify_export of a folder of something else",
        lambda folder: Attempt(lambda: verify_export(folder)),
        FileNotFoundError,
        ("dlqat_export.json", "export_model()"),
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# Memory and many devices


def large(shown: str, call: Callable[[Path], object], error: type[Exception], *says: str) -> Case:
    """A call without a model in memory, on a base model's folder, that is refused."""

    def attempt(folder: Path) -> Attempt:
        tiny_model().save_pretrained(folder / "base")
        return Attempt(lambda: call(folder))

    return Case("Memory and many devices", shown, attempt, error, says)


def pack_offloaded(folder: Path) -> Attempt:
    base = disk_offload(tiny_model(), folder / "offload", execution_device=torch.device("cpu"))
    return Attempt(lambda: get_peft_model(base, small_config(storage="int8")))


def lora_packed(folder: Path) -> object:
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    return load_packed(folder / "base", folder / "adapter")


def estimated(**changes: Any) -> Callable[[Path], object]:
    arguments = {"batch_size": 1, "sequence_length": 8, **changes}
    return lambda folder: estimate_memory(small_config(), str(folder / "base"), **arguments)


LARGE_CASES = [
    large(
        "load_packed with storage='full'",
        lambda folder: load_packed(folder / "base", small_config()),
        ValueError,
        "storage='full' packs nothing",
        "storage='int8'",
    ),
    large("load_packed with a LoRA adapter", lora_packed, TypeError, "LORA adapter", "DL-QAT"),
    large("estimate_memory(batch_size=0)", estimated(batch_size=0), ValueError, "batch_size=0", "positive integer"),
    large("estimate_memory(optimizer='lion')", estimated(optimizer="lion"), ValueError, "'lion'", "'adamw'", "'sgd'"),
    Case(
        "Memory and many devices",
        "storage='int8' on a base model that is offloaded to disk",
        pack_offloaded,
        ValueError,
        ("cannot pack", "offloaded to the CPU or disk", "load_packed"),
    ),
]

LOADING = list(loading_cases())
CASES = [
    *CONFIG_CASES,
    *INJECTING_CASES,
    *CALIBRATING_CASES,
    *DISTILLING_CASES,
    *(case for *_, case in LOADING),
    *RUNNING_CASES,
    *EXPORTING_CASES,
    *LARGE_CASES,
]


# ---------------------------------------------------------------------------------------------------------------------
# docs/errors.md


def raised(case: Case, folder: Path) -> tuple[str, str]:
    """Type and message of the error that a case raises, less what differs from run to run."""
    torch.manual_seed(0)
    attempt = case.attempt(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attempt.call()
        except Exception as error:
            message = str(error).replace(str(folder), "<folder>")
            return type(error).__name__, re.sub(r"0x[0-9a-f]{6,}", "0x...", message)
    raise AssertionError(f"{case.input} raises nothing")


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", "<br>").replace("<folder>", "&lt;folder&gt;").replace("*", r"\*")


def page() -> str:
    """docs/errors.md as it should be."""
    lines = [
        "# Errors",
        "",
        "What the package refuses, and what it says. A refused call changes no file and nothing of the model, but for",
        "one: an adapter that cannot be loaded stays in the model, as PEFT puts it in before the file is read; start",
        "again from a fresh base model. Files are checked by PEFT's `from_pretrained` and `load_adapter`, and by a",
        "resumed Trainer; transformers' own `model.load_adapter` compares names and shapes only.",
        "",
        f"Written by `{REGENERATE}` from the errors that are really raised, with the versions of PEFT",
        "and safetensors that pyproject.toml names; `tests/test_bad_input.py` fails when this page is out of date.",
    ]
    sections: dict[str, list[Case]] = {}
    for case in CASES:
        if case.listed:
            sections.setdefault(case.section, []).append(case)
    for section, cases in sections.items():
        lines += ["", f"## {section}", "", "| input | error type | message |", "|---|---|---|"]
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                error, message = raised(case, Path(folder))
            lines.append(f"| `{_code(case.input)}` | `{error}` | {_cell(message)} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return text.replace("|", r"\|")


def main() -> None:
    """Writes docs/errors.md."""
    transformers_logging.set_verbosity_error()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
