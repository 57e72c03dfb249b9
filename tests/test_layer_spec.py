"""The settings of one layer as a record; that layers are built by it is tested in test_layer and test_new_parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_dlqat import DLQATConfig
from peft_dlqat.layer_spec import LayerSpec, setting, stored_as, unit_of
from peft_dlqat.methods import DLQAT, LRQAT
from peft_dlqat.quant.grid import Grid


def spec_of(name="layers.0.mlp.up_proj", in_features=96, **settings):
    return LayerSpec.from_config(DLQATConfig(**settings), name, in_features)


def test_the_config_and_its_patterns_say_what_a_layer_is():
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "bits": 3,
        "group_size": 64,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"down_proj": 6},
        "bits_pattern": {r"layers\.0\.mlp\.up_proj": 5},
        "group_size_pattern": {"down_proj": -1},
    }
    up, down = spec_of(**settings), spec_of("layers.0.mlp.down_proj", **settings)
    assert (up.r, up.scaling, up.grid.bits, up.grid.group_size) == (2, 4.0, 5, 32)
    assert (down.r, down.scaling, down.grid.bits, down.grid.group_size) == (4, 1.5, 3, 96)
    assert spec_of(r=4, lora_alpha=8, use_rslora=True).scaling == 4.0
    assert setting(DLQATConfig(**settings), "bits", "layers.1.mlp.up_proj") == 3


def test_the_record_is_saved_as_numbers():
    spec = LayerSpec(Grid(3, 32, "integer", torch.float16), 4, 0.5, LRQAT(), storage="int4")
    encoded = spec.encode()
    assert encoded.tolist() == [3, 32, 1, 1, 0.5, LRQAT.number, 4, 3 + 64 / 1024] and stored_as(encoded) == "int4"
    assert stored_as(replace(spec, storage="full").encode()) == "full"
    assert stored_as(torch.tensor([0.0] * 6 + [5, 2])) is None
    k_quant = replace(spec, grid=Grid(6, 16, "none", torch.float32, k_quant=True))
    assert k_quant.encode().tolist()[:4] == [6, 16, 0, 3]


def test_numbers_that_differ_are_named():
    spec = LayerSpec(Grid(3, 32, "integer", torch.float16), 4, 1 / 3, DLQAT())
    other = LayerSpec(Grid(4, 32, "none", torch.bfloat16), 4, 0.5, LRQAT(), storage="int4")
    assert spec.differences(replace(spec, storage="int8").encode()) == []
    assert spec.differences(spec.encode() * (1 + 5e-6)) == []
    assert spec.differences(other.encode()) == [
        "bits: 4 in the file, 3 here",
        "zero_point: 'none' in the file, 'integer' here",
        "scale_dtype: 'bfloat16' in the file, 'float16' here",
        "lora scaling: 0.5 in the file, 0.333333 here",
        "method: 'lrqat' in the file, 'dlqat' here",
    ]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_numbers_that_a_file_lacks_have_their_defaults(missing):
    grid, numbers = Grid(3, 32, "none", torch.float16), {"one": (1.0, 10.0), "two": (2.0, 20.0)}
    encoded = LayerSpec(grid, 4, 1.0, DLQAT(), numbers=numbers).encode()
    expected = [1.0, 2.0][: 2 - missing] + [10.0, 20.0][2 - missing :]
    spec = LayerSpec(grid, 4, 1.0, DLQAT(), numbers=numbers)
    assert spec.completed(encoded[: 10 - missing]).tolist()[8:] == expected
    assert len(spec.differences(encoded[: 10 - missing])) == missing


def test_what_trains_is_the_methods_choice():
    spec = LayerSpec(Grid(3, 32, "none", torch.float16), 4, 1.0, DLQAT())
    shapes = {name: tensor.shape for name, tensor in spec.trained(24, 96).items()}
    assert shapes == {"A": (4, 96), "B": (24, 4), "magnitude": (24, 3)}


def test_the_unit_falls_with_the_layers_that_train_and_is_found_again():
    assert [unit_of(depth) for depth in (1, 4, 5, 6, 12, 30, 80, 1000)] == [64, 64, 64, 32, 16, 8, 4, 0.25]
    spec = replace(LayerSpec(Grid(3, 32, "none", torch.float16), 4, 1.0, DLQAT()), unit=8.0)
    assert {tensor.unit for tensor in spec.trained(24, 96).values()} == {8.0}
    here = replace(spec, unit=64.0)
    assert here.unit_in(spec.encode()) == 8 and here.differences(spec.encode())
    assert torch.equal(here.in_this_unit(spec.encode()), here.encode())
    other = spec.encode()
    for number in (3.007, 3.0, 4.0, 1.0):  # of no unit that there is
        other[7] = number
        assert here.unit_in(other) == 64 and here.differences(other)
