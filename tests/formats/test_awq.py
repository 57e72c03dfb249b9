"""AWQ's files decode to the trained weights; its engine runs in `make test-engines`."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from export_models import adapted, as_id, held, held_grids
from safetensors.torch import load_file

from peft_dlqat import export_model
from peft_dlqat.layer import adapter_layers


def outputs(words: torch.Tensor) -> torch.Tensor:
    """Numbers [rows, out] of words [rows, out / 8]: outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest four bits up."""
    fields = torch.stack([(words >> at) & 15 for at in range(0, 32, 4)], -1)
    return fields[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)


@pytest.mark.product(every=3)
@pytest.mark.parametrize("setting", held_grids("awq", (32, 128, -1)), ids=as_id)
def test_awq_files_decode_to_the_trained_weights(setting, tmp_path):
    model = adapted(**setting, shape={"num_hidden_layers": 1}, exclude_modules=r".*v_proj")
    export_model(model, tmp_path / "out", "awq", verify=False)
    files = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": setting["group_size"],
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.v_proj"],
    }
    for name, layer in adapter_layers(model.get_base_model())[1].items():
        codes, zeros = (outputs(files[f"{name}.{part}"]) for part in ("qweight", "qzeros"))
        group = torch.arange(len(codes)) // (len(codes) // len(zeros))
        weight = files[f"{name}.scales"].float()[group] * (codes - zeros[group])
        assert torch.equal(weight.t(), layer.quantized_weight().dequantize())


def test_groups_of_several_sizes_are_refused(tmp_path):
    model = adapted(bits=4, zero_point="none", group_size_pattern={"down_proj": 64}, scale_dtype="float16")
    with pytest.raises(ValueError, match=r"one group_size for all layers, and these have \[32, 64\]"):
        export_model(model, tmp_path / "out", "awq")


def test_what_it_holds():
    for dtype in (torch.bfloat16, torch.float16):
        assert held("awq", 80, dtype) == {*product((4,), ("none", "integer"))}
    assert held("awq", 32, torch.float32) == set()
