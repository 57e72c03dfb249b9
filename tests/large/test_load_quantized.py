"""A quantized file is opened, trained inside its own blocks, and written again as the same kind of file."""

from __future__ import annotations

import json
import warnings
from functools import cache

import pytest
import torch
from conftest import perturb, random_model
from export_models import CONFIGS, GEMMA, SHAPE
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from peft_dlqat import DLQATConfig, export_model, load_quantized
from peft_dlqat.formats.gguf_file import GGUFFile
from peft_dlqat.layer import adapter_layers

pytestmark = pytest.mark.xdist_group("llama.cpp")
gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

IDS = torch.arange(1, 33).view(2, 16)
SMALL = {**SHAPE, "num_hidden_layers": 1}
MODELS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "tied": lambda: LlamaConfig(**{**SMALL, "tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=64),
    "gemma3": lambda: Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 1}),
}
FILES = [
    ("llama", "Q4_K_M"),
    ("qwen3", "Q5_K_S"),
    ("gemma3", "Q2_K"),
    ("tied", "Q3_K_M"),
    ("llama", "Q4_0"),
    ("qwen3", "legacy"),
    ("tied", "float"),
]
CONFIG = {"r": 4, "task_type": "CAUSAL_LM"}


@cache
def model_of(kind):
    return random_model(MODELS[kind]())


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A function that opens a file of a model and a mixture: the file, and the model."""

    @cache
    def made(kind, mixture):
        folder = tmp_path_factory.mktemp(f"{kind}-{mixture}")
        model_of(kind).config.save_pretrained(folder)
        return write_gguf(model_of(kind), folder / "small.gguf", mixture)

    def open_(kind, mixture, **settings):
        path = made(kind, mixture)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*in types without a grid")
            return path, load_quantized(path, DLQATConfig(**CONFIG | settings), base=path.parent)[0]

    return open_


def decoded(path):
    """transformers' model of a file's weights as the gguf package decodes them, by transformers' names."""
    config = json.loads((path.parent / "config.json").read_text())
    kind = CONFIGS[{"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])]
    own = type(kind()).from_pretrained(path.parent)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=own, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize(("kind", "mixture"), FILES)
def test_untrained_it_is_what_the_file_says(opened, kind, mixture):
    path, model = opened(kind, mixture)
    expected = decoded(path)
    state = expected.state_dict()
    _, layers = adapter_layers(model.get_base_model())
    assert layers
    for name, layer in layers.items():
        assert torch.equal(layer.quantized_weight("default").dequantize(), state[f"{name}.weight"]), name
        assert torch.equal(layer.weight + 0, state[f"{name}.weight"])
    with torch.no_grad():
        logits = expected(IDS).logits
        assert torch.equal(model(IDS).logits, logits)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize(("kind", "mixture"), FILES)
def test_it_is_written_again(opened, tmp_path, kind, mixture):
    path, model = opened(kind, mixture)
    # Nothing of a trained tensor is copied: its place is empty until its own blocks come.
    with pytest.warns(UserWarning, match="never trained .* the file as it was"):
        export_model(model, tmp_path / "same", "gguf", verify=False)
    assert (tmp_path / "same" / "model.gguf").read_bytes() == path.read_bytes()

    perturb(model)
    export_model(model, tmp_path / "trained", "gguf", verify=False)
    written = tmp_path / "trained" / "model.gguf"
    old, new = GGUFFile.open(path), GGUFFile.open(written)
    assert (old.metadata, old.tensors) == (new.metadata, new.tensors)
    names = model.get_base_model().origin.names
    adapted = {names[f"{name}.weight"] for name in adapter_layers(model.get_base_model())[1]}
    assert {name for name in old.tensors if not torch.equal(old.read(name), new.read(name))} == adapted
    (tmp_path / "trained" / "config.json").write_text((path.parent / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(decoded(written)(IDS).logits, model(IDS).logits)


def test_types_without_a_grid_stay_as_they_are(opened):
    path, _ = opened("tied", "float")
    with pytest.warns(UserWarning, match="4 linear layers are decoded .* types without a grid"):
        model, _ = load_quantized(path, DLQATConfig(**CONFIG), base=path.parent)
    _, layers = adapter_layers(model.get_base_model())
    assert {name.rpartition(".")[2] for name in layers} == {"o_proj", "gate_proj", "up_proj"}
