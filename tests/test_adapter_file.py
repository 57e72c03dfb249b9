"""A saved adapter that is broken, or that does not belong here, is not loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, HIDDEN, calibrated, lm_batches, perturb, tiny_model, tokens
from peft import PeftModel, get_peft_model
from refusals import INF, NAN, adapted, outputs, refused
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from peft_dlqat import DLQATConfig, OtherBaseWarning, calibrate, pack_weights
from peft_dlqat.layer import adapter_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def _quiet_transformers():
    """Transformers reports mismatched tensors by its log, in a long table."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


# Changes of a good adapter: of all its tensors, of the bytes of one of its files


def entry(kind, value, position=0):
    """One number of the first tensor of a kind."""
    return lambda tensors: tensors[first(tensors, kind)].view(-1).__setitem__(position, value)


def first(tensors, kind):
    return min(name for name in tensors if name.removesuffix(".weight").endswith(kind))


def without(kind):
    return lambda tensors: tensors.pop(first(tensors, kind))


def added(name):
    return lambda tensors: tensors.update({f"base_model.model.model.layers.{name}": torch.zeros(HIDDEN, HIDDEN)})


def integers(kind):
    return lambda tensors: tensors.update({first(tensors, kind): tensors[first(tensors, kind)].long()})


def as_type(kind, dtype):
    return lambda tensors: tensors.update({first(tensors, kind): tensors[first(tensors, kind)].to(dtype)})


def longer(kind, count=1):
    """So many numbers more, as a later version's."""
    return lambda tensors: tensors.update(
        {first(tensors, kind): torch.cat([tensors[first(tensors, kind)], *[ONE] * count])}
    )


def settings(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def flipped(content):
    return bytes(byte ^ 0xFF if 20 <= i < 40 else byte for i, byte in enumerate(content))


def bfloat16_base():
    return tiny_model(dtype=torch.bfloat16)


def base_of_another_shape():
    config = CONFIGS["llama"]()
    config.intermediate_size = 96  # not 128
    return AutoModelForCausalLM.from_config(config).eval()


@dataclass(frozen=True)
class Bad:
    """An adapter, on a grid of some zero_point, that is spoilt or meets a wrong base; and what is said."""

    says: tuple[str, ...]
    tensors: Callable = lambda tensors: None
    content: Callable = lambda content: content
    config: Callable | None = None  # of adapter_config.json, which is not read where the adapter exists
    zero_point: str = "integer"
    base: Callable = tiny_model

    def write(self, files, folder):
        tensors = load(files[WEIGHTS])
        self.tensors(tensors)
        (folder / WEIGHTS).write_bytes(self.content(save(tensors, metadata={"format": "pt"})))
        (folder / CONFIG).write_bytes((self.config or settings())(files[CONFIG]))


ONE = torch.ones(1)
BROKEN, BESIDE, HEADER = "broken", "adapter_config.json", ("header",)
A, B, M, SCALE, ZERO, SPEC = (f"dlqat_{name}" for name in ("A", "B", "magnitude", "scale", "zero_point", "spec"))
RANGE = f"down_proj.{ZERO}", "integers from -8 to 7", BROKEN
BAD = {
    "truncated in the middle": Bad(HEADER, content=lambda content: content[: len(content) // 2]),
    "truncated in the header": Bad(HEADER, content=lambda content: content[:100]),
    "empty": Bad(HEADER, content=lambda content: b""),
    "bytes flipped in the header": Bad(HEADER, content=flipped),
    "length of the header": Bad(HEADER, content=lambda content: struct.pack("<Q", 2**40) + content[8:]),
    "NaN in a scale": Bad((f"down_proj.{SCALE}", "NaN", BROKEN), entry(SCALE, NAN)),
    "NaN, bfloat16": Bad((f"down_proj.{SCALE}", "NaN", BROKEN), entry(SCALE, NAN), base=bfloat16_base),
    "infinity in A": Bad((f"down_proj.{A}", "infinity", BROKEN), entry(A, INF)),
    "NaN in a magnitude": Bad((f"down_proj.{M}", "NaN", BROKEN), entry(M, NAN)),
    "scale 0": Bad((f"down_proj.{SCALE}", "positive", "0.0", BROKEN), entry(SCALE, 0.0)),
    "scale 0, symmetric": Bad((f"down_proj.{SCALE}", "non-zero", "0.0:"), entry(SCALE, 0.0), zero_point="none"),
    "negative scale": Bad((f"down_proj.{SCALE}", "positive", "-1.0", BROKEN), entry(SCALE, -1.0)),
    "negative scale, float": Bad(("positive", "-1.0"), entry(SCALE, -1.0), zero_point="float"),
    "zero point 0.5": Bad(("0.5", *RANGE), entry(ZERO, 0.5)),
    "zero point 99": Bad(("99.0", *RANGE), entry(ZERO, 99.0)),
    "a missing tensor": Bad(("missing", f"down_proj.{B}", BESIDE), without(B)),
    "a missing spec": Bad(("missing", f"down_proj.{SPEC}", BESIDE), without(SPEC)),
    "a layer not adapted": Bad(("unexpected", f"k_proj.{A}", BESIDE), added(f"0.self_attn.k_proj.{A}")),
    "a tensor of no layer": Bad(("unexpected", "layers.9"), added("9.mlp.weight")),
    "a base weight": Bad(("unexpected", "q_proj.base_layer.weight"), added("0.self_attn.q_proj.base_layer.weight")),
    "a norm": Bad(("unexpected", "norm.weight"), added("0.input_layernorm.weight")),
    "an unadapted weight": Bad(("unexpected", "k_proj.weight"), added("0.self_attn.k_proj.weight")),
    "float8 in A": Bad(
        (f"down_proj.{A}", "float8_e4m3fn", "16 bits or more", BROKEN), as_type(A, torch.float8_e4m3fn)
    ),
    "complex numbers in B": Bad((f"down_proj.{B}", "complex64", BROKEN), as_type(B, torch.complex64)),
    "an embedding of another shape": Bad(
        ("model.embed_tokens.weight", "[3]", "resize_token_embeddings"),
        lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": torch.zeros(3)}),
    ),
    "an embedding of integers": Bad(
        ("model.embed_tokens.weight", "int64", BROKEN),
        lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": torch.zeros(3).long()}),
    ),
    "a norm of its shape": Bad(
        ("unexpected", "model.norm.weight"),
        lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.full((HIDDEN,), NAN)}),
    ),
    "an unadapted weight of its shape": Bad(
        ("unexpected", "gate_proj.weight"),
        lambda tensors: tensors.update(
            {"base_model.model.model.layers.0.mlp.gate_proj.weight": torch.ones(128, HIDDEN)}
        ),
    ),
    "integers in A": Bad((f"down_proj.{A}", "int64", "float"), integers(A)),
    "spec of 3 bits": Bad(("bits: 3 in the file, 4 here", "beside it"), entry(SPEC, 3.0)),
    "a format before the last": Bad(("format: 1 in the file, 3 here",), entry(SPEC, 1.0, -1)),
    "a newer format": Bad(("format: 4 in the file, 3 here",), entry(SPEC, 4.0, -1)),
    "a setting that is not known": Bad((f"down_proj.{SPEC}", "10 settings", "knows 9", "update"), longer(SPEC, 2)),
    "a storage that is not known": Bad(("names storage 7", "none of ['full'", BROKEN), entry(SPEC, 7.0, 6)),
    "NaN in the spec": Bad((SPEC, "NaN"), entry(SPEC, NAN)),
    "bits": Bad(("bits: 4 in the file, 3 here", "beside it"), config=settings(bits=3)),
    "lora_alpha": Bad(("lora scaling", "2 in the file"), config=settings(lora_alpha=4)),
    "scale_dtype": Bad(("'bfloat16' in the file",), config=settings(scale_dtype="float32")),
    "zero_point": Bad(("unexpected", "zero_point"), config=settings(zero_point="none")),
    "r": Bad(("shapes", "not [8, "), config=settings(r=8)),
    "group_size": Bad(("shapes", "not [64, 4]"), config=settings(group_size=16)),
    "r=10**7": Bad(("r=10000000", "larger than both sides", "at most 64"), config=settings(r=10**7)),
    "storage=int9": Bad((CONFIG, "storage='int9'", "must be one of"), config=settings(storage="int9")),
    "bits=1": Bad(("bits=1", "2 to 8", "use 4"), config=settings(bits=1)),
    "no JSON": Bad((), config=lambda content: content[:50]),
    "base of another shape": Bad(
        ("shapes", "[4, 128], not [4, 96]", "base model that it was trained on"), base=base_of_another_shape
    ),
}


# Ways of loading. Each returns the model that there is before, and the call.


def from_pretrained(bad, folder, **kwargs):
    return None, lambda: PeftModel.from_pretrained(bad.base(), str(folder), **kwargs)


def load_adapter(bad, folder, name="second", **kwargs):
    model = adapted(bad.base(), seed=1, zero_point=bad.zero_point)
    return model, lambda: (model.load_adapter(str(folder), name, **kwargs), model.set_adapter(name))


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

    return files


def ways_of(bad):
    """Over the same adapter, adapter_config.json is not read, and the base is the adapter's own."""
    return [way for way in WAYS if way != OVER or not (bad.config or bad.base is base_of_another_shape)]


CASES = [
    pytest.param(name, way, marks=[] if i % len(ways_of(bad)) == j else pytest.mark.slow)
    for i, (name, bad) in enumerate(BAD.items())
    for j, way in enumerate(ways_of(bad))
]


@pytest.mark.parametrize("name, way", CASES)
def test_a_bad_adapter_is_refused(name, way, good, tmp_path):
    """PEFT puts an adapter in before its file is read; what was there before is as it was."""
    bad = BAD[name]
    bad.write(good(bad.zero_point), tmp_path)
    model, call = WAYS[way](bad, tmp_path)
    errors = (ValueError, SafetensorError) if bad.says == HEADER else ValueError
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


OWN_WAY = [
    "a missing tensor", "a norm of its shape", "an unadapted weight of its shape", "NaN in a scale", "infinity in A",
    "negative scale", "zero point 99", "spec of 3 bits", "a storage that is not known",
]  # fmt: skip


@pytest.mark.product
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("name", OWN_WAY)
def test_transformers_own_loading_is_looked_at_before_the_model_runs(name, is_trainable, good, tmp_path):
    bad, model = BAD[name], tiny_model()
    bad.write(good(bad.zero_point), tmp_path)
    model.load_adapter(str(tmp_path), is_trainable=is_trainable)
    for _ in range(2):
        with refused(ValueError, *bad.says):
            outputs(model)


@pytest.mark.parametrize("way", ["from_pretrained", "low_cpu_mem_usage", "transformers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_of_another_dtype_become_float32(dtype, way, good, tmp_path):
    """As somebody may have converted them."""
    tensors = load(good("integer")[WEIGHTS])
    tensors = {key: value if key.endswith((SPEC, "record")) else value.to(dtype) for key, value in tensors.items()}
    (tmp_path / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (tmp_path / CONFIG).write_bytes(good("integer")[CONFIG])
    loaded = tiny_model()
    if way == "transformers":
        loaded.load_adapter(str(tmp_path))
    else:
        PeftModel.from_pretrained(loaded, tmp_path, low_cpu_mem_usage=way == "low_cpu_mem_usage")
    assert torch.isfinite(outputs(loaded)).all()
    for layer in adapter_layers(loaded)[1].values():
        for kind in layer.adapter_layer_names:
            if (found := getattr(layer, kind).get("default")) is not None:
                assert isinstance(found, torch.nn.Parameter) and found.dtype == torch.float32, kind


def test_a_fresh_adapter_of_a_saved_config_is_none_that_was_loaded(good, tmp_path):
    (tmp_path / CONFIG).write_bytes(good("integer")[CONFIG])
    config = DLQATConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = tiny_model()
    model.add_adapter(config)
    model.model.norm.weight.data *= 2
    assert torch.isfinite(outputs(model)).all()


def test_transformers_own_loading_of_a_module_that_trains_in_full(tmp_path):
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    tensors = load((tmp_path / WEIGHTS).read_bytes())
    tensors["base_model.model.lm_head.weight"][0, 0] = NAN
    (tmp_path / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    model = tiny_model()
    model.load_adapter(str(tmp_path))
    with refused(ValueError, "lm_head.modules_to_save.default.weight", "NaN", BROKEN):
        outputs(model)


@pytest.mark.parametrize("storage", ["full", "int4"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_transformers_own_loading_is_checked_at_the_first_forward(storage, is_trainable, tmp_path):
    """It puts tensors into the model past PEFT's loading."""
    model = tiny_model()
    model.add_adapter(DLQATConfig(bits=3, group_size=32, zero_point="integer", storage=storage))
    calibrate(model, lm_batches(1), steps=0, progress=False)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = tiny_model()
    loaded.load_adapter(tmp_path, is_trainable=is_trainable)
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)
    assert {layer.specs["default"].storage for layer in adapter_layers(loaded)[1].values()} == {storage}
    assert calibrated(loaded)  # what was done is not done again
    other = tiny_model()
    other.model.layers[0].mlp.up_proj.weight.data += 1
    other.load_adapter(tmp_path, is_trainable=is_trainable)
    with pytest.warns(UserWarning, match=r"other base weights .*1 of 14 layers, such as .*0\.mlp\.up_proj;"):
        other(tokens())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    saved[next(key for key in saved if "dlqat_scale" in key)][0] = -1
    save_file(saved, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    broken = tiny_model()
    broken.load_adapter(tmp_path, is_trainable=is_trainable)
    with pytest.raises(ValueError, match=r"dlqat_scale of the saved adapter must be positive, but holds -1"):
        broken(tokens())


@pytest.mark.parametrize("storage", ["full", "int4"])
def test_a_model_may_change_before_its_first_forward(storage, tmp_path):
    """Moved, cast or packed, after transformers' own loading: its Parameters are the same ones."""
    model = tiny_model()
    model.add_adapter(DLQATConfig(bits=3, group_size=32, storage=storage))
    calibrate(model, lm_batches(1), steps=0, progress=False)
    model.save_pretrained(tmp_path)
    expected = model.eval()(tokens()).logits
    loaded = tiny_model()
    loaded.load_adapter(tmp_path)
    loaded._apply(torch.clone)
    pack_weights(loaded)
    assert torch.equal(loaded(tokens()).logits, expected)
    cast = tiny_model()
    cast.load_adapter(tmp_path)
    with pytest.warns(OtherBaseWarning):  # its W0 is another one now
        cast.to(torch.bfloat16)(tokens())


def test_a_new_adapter_by_a_saved_config(tmp_path):
    """Nothing is loaded into it, and buffers are new ones after every move."""
    get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    config = DLQATConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(tiny_model(), config)
    model._apply(torch.clone)
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize("method", ["dlqat", "peqa"])
@pytest.mark.parametrize("was_trained", [False, True])
def test_a_file_without_a_record_keeps_the_scales_that_it_was_trained_on(method, was_trained, tmp_path):
    """Of an older version or by another hand: it does not say whether they are calibrated."""
    given = DLQATConfig(bits=3, group_size=32, init="minmax", method=method, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), given)
    if was_trained:
        perturb(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "dlqat_record" not in key}, file)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert calibrated(loaded) == was_trained
    assert torch.equal(loaded.eval()(tokens()).logits, model.eval()(tokens()).logits)
