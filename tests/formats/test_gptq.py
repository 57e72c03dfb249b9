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
from peft_dlqat.formats import FORMATS
from peft_dlqat.layer import adapter_layers
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.quantizer import QuantizedWeight


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
    """By gptqmodel's rule, w = scale * (code - zero), where 1 is added to each zero in words of 32 bits."""
    model = adapted(**setting)
    export_model(model, tmp_path / "out", "gptq", verify=False)
    files = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == setting["bits"] and config["sym"] is (setting["zero_point"] == "none")
    bits = config["bits"]
    for name, layer in adapter_layers(model.get_base_model())[1].items():
        codes = words_to_codes(files[f"{name}.qweight"], bits)
        stored = files[f"{name}.qzeros"]
        if bits != 3:  # 0 has borrowed from its neighbour
            stored = (stored.long() + sum(1 << at for at in range(0, 32, bits))).to(torch.int32)
        zeros = words_to_codes(stored.t().contiguous(), bits).t()
        zeros = zeros if bits != 3 else (zeros + 1) % 8
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


ZEROS = torch.tensor([[0, 1, 8, 15] * 8, [3, 0, 0, 15] * 8]).t()  # [out, n_groups]


def weight_with(zeros, bits=4):
    grid = Grid(bits, 32, "integer", torch.float16)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (32, 64), dtype=torch.int8)
    return QuantizedWeight(codes, torch.rand(32, 2).half().float(), zeros.float() + grid.qmin, grid)


@pytest.mark.parametrize(("version", "meta"), [("gptq_v2", {}), ("gptq", {"quantizer": ["gptqmodel:7.7.0"]})])
def test_both_versions_are_read(version, meta):
    section = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": version, "meta": meta}
    layout, weight = FORMATS["gptq"].layout(section), weight_with(ZEROS)
    tensors = layout.tensors(weight)
    if version == "gptq_v2":
        assert torch.equal(words_to_codes(tensors["qzeros"].t().contiguous(), 4), ZEROS)
    again = layout.weight(tensors, weight.grid)
    assert all(torch.equal(getattr(again, name), getattr(weight, name)) for name in ("codes", "scale", "zero"))


def test_a_zero_of_0_in_version_1_is_read_of_gptqmodel_alone():
    layout = FORMATS["gptq"].layout({"quant_method": "gptq", "bits": 4, "sym": False})
    weight = weight_with(ZEROS.clamp(min=1))
    assert torch.equal(layout.weight(layout.tensors(weight), weight.grid).zero, weight.zero)
    weight = weight_with(ZEROS)
    with pytest.raises(ValueError, match="has a zero point of 0, which version 1 has no number for"):
        layout.weight(layout.tensors(weight), weight.grid)


def test_layers_of_their_own():
    dynamic = {
        r"+:.*down_proj": {"bits": 8, "group_size": -1, "sym": False},
        r"-:.*v_proj": {},
        "lm_head": {"bits": 2},
    }
    layout = FORMATS["gptq"].layout({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": dynamic})

    def grid(name):
        return layout.grid(name, (), 256, torch.float16)

    assert grid("model.layers.0.mlp.down_proj") == Grid(8, 256, "integer", torch.float16)
    assert grid("model.layers.0.self_attn.v_proj") is None
    assert grid("model.layers.0.self_attn.q_proj") == Grid(4, 128, "none", torch.float16)
    assert grid("lm_head") == Grid(2, 128, "none", torch.float16)
    assert set(layout.regexes) == {".*down_proj", ".*v_proj", "lm_head"}
