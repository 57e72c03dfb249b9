"""A saved adapter that is broken, or that does not belong here, is not loaded."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, HIDDEN, perturb, tiny_model
from peft import PeftModel, get_peft_model
from refusals import INF, NAN, adapted, outputs, refused, small_config
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from peft_dlqat.layer import adapter_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def _quiet_transformers():
    """Transformers reports mismatched tensors by its log, in a long table."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


# ---------------------------------------------------------------------------------------------------------------------
# Changes of a good adapter's files: dicts from name to content


def edit_tensors(edit):
    """`edit` is given the tensors and the name of the first that ends as the kind does."""

    def of_kind(kind, *args):
        def change(files):
            tensors = load(files[WEIGHTS])
            edit(tensors, min((name for name in tensors if name.endswith(kind)), default=kind), *args)
            files[WEIGHTS] = save(tensors, metadata={"format": "pt"})

        return change

    return of_kind


@edit_tensors
def entry(tensors, name, value, position=0):
    tensors[name].view(-1)[position] = value


@edit_tensors
def without(tensors, name):
    del tensors[name]


@edit_tensors
def added(tensors, name):
    tensors[f"base_model.model.{name}"] = torch.zeros(HIDDEN, HIDDEN)


@edit_tensors
def cast(tensors, name, dtype):
    tensors[name] = tensors[name].to(dtype)


def raw(edit, file=WEIGHTS):
    return lambda files: files.update({file: edit(files[file])})


def config(**settings):
    return raw(lambda content: json.dumps({**json.loads(content), **settings}).encode(), CONFIG)


def bfloat16_base():
    return tiny_model(dtype=torch.bfloat16)


def base_of_another_shape():
    settings = CONFIGS["llama"]()
    settings.intermediate_size = 96  # not 128
    return AutoModelForCausalLM.from_config(settings).eval()


@dataclass(frozen=True)
class Bad:
    """How a good adapter, on a grid of some zero_point, was spoilt or is loaded on a wrong base, and what is said."""

    change: object
    says: tuple[str, ...]
    zero_point: str = "integer"
    base: object = tiny_model
    in_config: bool = False  # the fault is in adapter_config.json, which is not read where the adapter exists
    unreadable: bool = False  # safetensors itself, or json, refuses the file


def of_config(change, *says, **kwargs):
    return Bad(change, says, in_config=True, **kwargs)


def flipped(content):
    return bytes(byte ^ 0xFF if 20 <= i < 40 else byte for i, byte in enumerate(content))


DOWN = "down_proj.dlqat_"
BAD = {
    "truncated in the middle": Bad(raw(lambda x: x[: len(x) // 2]), ("header",), unreadable=True),
    "truncated in the header": Bad(raw(lambda x: x[:100]), ("header",), unreadable=True),
    "empty": Bad(raw(lambda x: b""), ("header",), unreadable=True),
    "bytes flipped in the header": Bad(raw(flipped), ("header",), unreadable=True),
    "length of the header": Bad(raw(lambda x: struct.pack("<Q", 2**40) + x[8:]), ("header",), unreadable=True),
    "NaN in a scale": Bad(entry("dlqat_scale", NAN), (f"{DOWN}scale", "NaN", "broken")),
    "the same, bfloat16": Bad(entry("dlqat_scale", NAN), (f"{DOWN}scale", "NaN", "broken"), base=bfloat16_base),
    "infinity in A": Bad(entry("dlqat_A", INF), (f"{DOWN}A", "infinity", "broken")),
    "NaN in a magnitude": Bad(entry("dlqat_magnitude", NAN), (f"{DOWN}magnitude", "NaN", "broken")),
    "scale 0": Bad(entry("dlqat_scale", 0.0), (f"{DOWN}scale", "positive", "0.0", "broken")),
    "scale 0, symmetric": Bad(entry("dlqat_scale", 0.0), (f"{DOWN}scale", "non-zero", "0.0:"), "none"),
    "negative scale": Bad(entry("dlqat_scale", -1.0), (f"{DOWN}scale", "positive", "-1.0", "broken")),
    "negative scale, float offset": Bad(entry("dlqat_scale", -1.0), ("positive", "-1.0"), "float"),
    "zero point 0.5": Bad(entry("dlqat_zero_point", 0.5), (f"{DOWN}zero_point", "0.5", "integers", "-8 to 7")),
    "zero point 99": Bad(entry("dlqat_zero_point", 99.0), (f"{DOWN}zero_point", "99.0", "-8 to 7", "broken")),
    "a missing tensor": Bad(without("dlqat_B"), ("missing", f"{DOWN}B", "adapter_config.json")),
    "a missing spec": Bad(without("dlqat_spec"), ("missing", f"{DOWN}spec", "adapter_config.json")),
    "a layer that is not adapted": Bad(
        added("model.layers.0.self_attn.k_proj.dlqat_A"), ("unexpected", "k_proj.dlqat_A", "adapter_config.json")
    ),
    "a tensor of no layer": Bad(added("model.layers.9.mlp.weight"), ("unexpected", "layers.9")),
    "a base weight": Bad(
        added("model.layers.0.self_attn.q_proj.base_layer.weight"), ("unexpected", "q_proj.base_layer.weight")
    ),
    "integers in A": Bad(cast("dlqat_A", torch.int64), (f"{DOWN}A", "int64", "float")),
    "spec of 3 bits": Bad(entry("dlqat_spec", 3.0), ("bits: 3 in the file, 4 here", "beside it")),
    "an older format": Bad(entry("dlqat_spec", 1.0, -1), ("format: 1 in the file, 2 here",)),
    "NaN in the spec": Bad(entry("dlqat_spec", NAN), ("dlqat_spec", "NaN")),
    "config of 3 bits": of_config(config(bits=3), "bits: 4 in the file, 3 here", "beside it"),
    "config of another alpha": of_config(config(lora_alpha=4), "lora scaling", "2 in the file"),
    "config of another scale_dtype": of_config(config(scale_dtype="float32"), "'bfloat16' in the file"),
    "config of another zero_point": of_config(config(zero_point="none"), "unexpected", "zero_point"),
    "config of another rank": of_config(config(r=8), "shapes", "not [8, "),
    "config of another group_size": of_config(config(group_size=16), "shapes", "not [64, 4]"),
    "config of 1 bit": of_config(config(bits=1), "bits=1", "2 to 8", "use 4"),
    "config is no JSON": of_config(raw(lambda x: x[:50], CONFIG), unreadable=True),
    "base model of another shape": Bad(
        lambda files: None,
        ("shapes", "[4, 128], not [4, 96]", "base model that it was trained on"),
        base=base_of_another_shape,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Ways of loading. Each returns the model that there is before, and the call.


def from_pretrained(bad, folder, **kwargs):
    return None, lambda: PeftModel.from_pretrained(bad.base(), str(folder), **kwargs)


def load_adapter(bad, folder, name="second", **kwargs):
    settings = small_config(zero_point=bad.zero_point, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(bad.base(), settings)
    perturb(model, seed=1)
    return model.eval(), lambda: (model.load_adapter(str(folder), name, **kwargs), model.set_adapter(name))


OVER = "load_adapter over the same"
WAYS = {
    "from_pretrained": from_pretrained,
    "from_pretrained, low_cpu_mem_usage": lambda bad, folder: from_pretrained(bad, folder, low_cpu_mem_usage=True),
    "load_adapter": load_adapter,
    "load_adapter, low_cpu_mem_usage": lambda bad, folder: load_adapter(bad, folder, low_cpu_mem_usage=True),
    OVER: lambda bad, folder: load_adapter(bad, folder, "default"),
}


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """The files of a good adapter, by its zero_point."""

    @cache
    def files(zero_point):
        folder = tmp_path_factory.mktemp("good")
        adapted(zero_point=zero_point).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return lambda zero_point: dict(files(zero_point))


# Each in one way quickly, and in all. Over the same adapter, adapter_config.json is not read, and no base is made.
CASES = [
    pytest.param(name, way, marks=[] if way == list(WAYS)[i % len(WAYS)] else pytest.mark.slow)
    for i, (name, bad) in enumerate(BAD.items())
    for way in WAYS
    if way != OVER or not (bad.in_config or bad.base is base_of_another_shape)
]


@pytest.mark.parametrize("name, way", CASES)
def test_a_bad_adapter_is_refused(name, way, good, tmp_path):
    """PEFT puts an adapter in before its file is read; what was there before is as it was."""
    bad = BAD[name]
    files = good(bad.zero_point)
    bad.change(files)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    model, call = WAYS[way](bad, tmp_path)
    errors = (ValueError, SafetensorError) if bad.unreadable else ValueError
    with refused(errors, *bad.says, model=model if way == OVER else None, folder=tmp_path, draws=way != OVER):
        call()


@pytest.mark.parametrize("way", ["from_pretrained", "from_pretrained, low_cpu_mem_usage", "load_adapter"])
def test_negative_scales_of_a_symmetric_grid_load(way, tmp_path):
    """The scale of a symmetric grid is signed: half of them are negative, and the logits are those saved."""
    saved = adapted(zero_point="none")
    scales = torch.cat([layer.dlqat_scale["default"].flatten() for layer in adapter_layers(saved)[1].values()])
    assert 0.2 < (scales < 0).float().mean() < 0.8
    saved.save_pretrained(tmp_path)
    model, call = WAYS[way](SimpleNamespace(base=tiny_model, zero_point="integer"), tmp_path)
    loaded = call()
    found = outputs(loaded if model is None else model)
    assert torch.equal(found, outputs(saved)) and not torch.equal(found, outputs(tiny_model()))
