"""GPTQ's files decode to the trained weights; its engine runs in `make test-engines`."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from export_models import adapted, as_id, held, held_grids
from safetensors.torch import load_file

from peft_dlqat import export_model
from peft_dlqat.layer import adapter_layers


def test_gptq_needs_multiples_of_32_on_both_sides(tmp_path):
    """Foretold when the adapter is made, and refused at export."""
    shape = {"intermediate_size": 496}
    with pytest.raises(ValueError, match=r"gptq cannot pack a weight of 496 x 256.*multiples of 32"):
        adapted("llama", shape=shape, bits=4, export=["gptq"])
    model = adapted("llama", shape=shape, bits=4, group_size=-1)
    with pytest.raises(ValueError, match="gptq cannot pack a weight of"):
        export_model(model, tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())


def words_to_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, ...] of a dense little-endian bit stream down the first dimension [n * bits / 32, ...]."""
    stream = np.unpackbits(words.t().contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    codes = (stream.reshape(words.shape[1], -1, bits) << np.arange(bits)).sum(-1)
    return torch.from_numpy(codes).t()


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", held_grids("gptq", (32, 128, -1)), ids=as_id)
def test_gptq_files_decode_to_the_trained_weights(setting, tmp_path):
    """By the format's own rule, w = scale * (code - (stored zero + 1)); its engine runs in `make test-engines`."""
    model = adapted(**setting)
    export_model(model, tmp_path / "out", "gptq", verify=False)
    files = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == setting["bits"] and config["sym"] is (setting["zero_point"] == "none")
    bits = config["bits"]
    for name, layer in adapter_layers(model.get_base_model())[1].items():
        codes = words_to_codes(files[f"{name}.qweight"], bits)
        zeros = (words_to_codes(files[f"{name}.qzeros"].t().contiguous(), bits).t() + 1) % 2**bits
        group = files[f"{name}.g_idx"].long()
        weight = files[f"{name}.scales"].float()[group] * (codes - zeros[group])
        assert torch.equal(weight.t(), layer.quantized_weight().dequantize())


def test_the_config_names_the_layers_that_have_other_settings_or_none(tmp_path):
    """gptqmodel reads them as regular expressions."""
    model = adapted(bits=4, zero_point="none", bits_pattern={"down_proj": 8}, exclude_modules=r".*v_proj")
    export_model(model, tmp_path / "out", "gptq", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    dynamic, producers = config.pop("dynamic"), config.pop("meta")["quantizer"]
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    assert dynamic == {
        **{rf"+:^model\.layers\.{i}\.mlp\.down_proj$": {"bits": 8, "group_size": 32, "sym": True} for i in range(2)},
        **{rf"-:^model\.layers\.{i}\.self_attn\.v_proj$": {} for i in range(2)},
        r"-:^lm_head$": {},
    }
    assert producers == ["peft-dlqat"]


@pytest.mark.parametrize("size", [16, 80, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_it_holds(size, dtype):
    assert held("gptq", size, dtype) == {*product((2, 3, 4, 8), ("none", "integer"))}
    assert held("gptq", size, torch.float32) == set()
