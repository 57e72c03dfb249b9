"""What formats say of grids."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from export_models import adapted
from safetensors.torch import load_file

from peft_dlqat import export_model
from peft_dlqat.formats import FORMATS
from peft_dlqat.formats.base import TensorInfo
from peft_dlqat.quant.grid import Grid
from peft_dlqat.quant.quantizer import QuantizedWeight


def test_remedies_are_held():
    """Whatever a remedy says is held; whatever is said to be held, some type holds."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for bits, size, zero, dtype in itertools.product(
        range(2, 9), (16, 32, 80, 256, -1), ("none", "integer", "float"), dtypes
    ):
        grid = Grid(bits, size, zero, dtype)
        for format in FORMATS.values():
            problem = format.problem(grid)
            assert bool(problem) is not format.holds(grid)
            if not problem:
                assert format.stored_as(grid)[1] >= bits
                continue
            for remedy in problem.partition("; use ")[2].split(" or "):
                changes = dict(re.findall(r"(\w+)='?(\w+)'?", remedy))
                assert changes, problem
                fixed = Grid(
                    int(changes.get("bits", bits)),
                    int(changes.get("group_size", size)),
                    changes.get("zero_point", zero),
                    getattr(torch, changes["scale_dtype"]) if "scale_dtype" in changes else dtype,
                )
                assert format.holds(fixed), problem
    (problem,) = {FORMATS["mlx"].problem(Grid(3, 16, "none", torch.float32, k_quant=True))}
    assert "group_size=32" in problem and "scale_dtype=" in problem, "a K-quant's groups do not change alone"


def weight_on(grid, out=64, n_in=256):
    """A weight of all codes, with scales that differ and are exact in every dtype."""
    codes = torch.randint(grid.qmin, grid.qmax + 1, (out, n_in), dtype=torch.int8)
    shape = out, n_in // grid.group_size
    scale = 2.0 ** torch.randint(-8, 0, shape)
    zero = {
        "none": None,
        "integer": torch.randint(grid.qmin, grid.qmax + 1, shape).float(),
        "float": -(2.0 ** torch.randint(-8, 0, shape)),
    }[grid.zero_point]
    return QuantizedWeight(codes, scale, zero, grid)


def info(weight):
    return TensorInfo("layer.weight", tuple(weight.codes.shape), torch.float32, weight.grid)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "mlx"])
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("size", [32, 256])
def test_the_bits_of_a_weight_are_those_of_its_tensors(name, zero, size):
    format = FORMATS[name]
    if format.package:
        pytest.importorskip(format.package.replace("-", "_"))
    for bits in range(2, 9):
        weight = weight_on(Grid(bits, size, zero, torch.float16))
        if format.holds(weight.grid):
            tensors = format.tensors(weight)
            stored = sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in SHARED)
            assert 8 * stored / weight.codes.numel() == format.stored_as(weight.grid)[1]


# Of a layer, not of a weight: its shape, and the groups of its inputs.
SHARED = ("weight_shape", "g_idx")


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_one_scale_a_row_of_unknown_length_counts_as_nothing(name):
    assert FORMATS[name].stored_as(Grid(4, -1, "none", torch.float16))[1] == 4


def test_shapes_that_are_packed():
    grid = Grid(4, 32, "none", torch.bfloat16)
    held = [name for name, format in FORMATS.items() if not format.problem(grid, (33, 32))]
    assert held == [name for name in FORMATS if name not in ("gptq", "awq")]
    transposed = [name for name, format in FORMATS.items() if not format.problem(grid, (64, 32), conv1d=True)]
    assert sorted(transposed) == ["dense", "gguf"]


@pytest.mark.parametrize("zero", ["none", "integer"])
def test_a_wider_grid_of_smaller_groups_holds_the_same_weight(zero):
    weight = weight_on(Grid(3, 64, zero, torch.float16))
    wide = Grid(4, 32, "integer", torch.float16)
    fitted = FORMATS["compressed-tensors"].fit(info(weight), weight, wide)
    assert fitted.grid == wide and fitted.scale.shape == (64, 8)
    assert torch.equal(fitted.dequantize(), weight.dequantize())


@pytest.mark.parametrize("zero", ["none", "integer"])
def test_a_scale_that_is_not_exact_is_refused_unless_its_group_is_zero(zero):
    weight = weight_on(Grid(4, 32, zero, torch.float32))
    weight.scale[3, 2] = 1e-9
    with pytest.raises(ValueError, match="a scale or offset of 1e-09 has no exact float16"):
        FORMATS["gptq"].fit(info(weight), weight, weight.grid)
    weight.grid.group(weight.codes)[3, 2] = 0 if zero == "none" else int(weight.zero[3, 2])
    fitted = FORMATS["gptq"].fit(info(weight), weight, weight.grid)
    assert fitted.scale[3, 2] == 1 and torch.equal(fitted.dequantize(), weight.dequantize())


def test_an_offset_that_is_not_exact_is_refused():
    weight = weight_on(Grid(4, 32, "float", torch.float16))
    FORMATS["gguf"].fit(info(weight), weight, weight.grid)
    weight.zero[0, 0] = 1 / 3
    with pytest.raises(ValueError, match=r"a scale or offset of 0\.333333 has no exact float16"):
        FORMATS["gguf"].fit(info(weight), weight, weight.grid)


@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_base_of_16_bits_that_was_loaded_in_float32_is_written_in_16(dtype, stored, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = adapted(bits=4)
    for name, parameter in model.named_parameters():
        if "_proj" not in name and "model.norm" not in name:
            parameter.data = parameter.data.bfloat16().float()
    found = export_model(model, tmp_path / "out", "compressed-tensors", dtype=dtype)
    assert found is not None and found.ok and found.loss is None
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == tensors["lm_head.weight"].dtype == stored
    assert tensors["model.norm.weight"].dtype == torch.float32


Q2_K = "group_size=16, zero_point='float', scale_dtype='k_quant'"


@pytest.mark.parametrize(
    ("format", "grid", "in_features", "advice"),
    [
        ("gguf", Grid(3, 128, "none", torch.bfloat16), None, "group_size=16, scale_dtype='k_quant' takes 3.44"),
        ("gguf", Grid(2, 128, "none", torch.bfloat16), None, f"{Q2_K} takes 2.62"),
        ("gguf", Grid(3, 96, "none", torch.bfloat16), 576, "bits=4, group_size=32 takes 4.50"),
        ("gguf", Grid(4, 128, "integer", torch.bfloat16), None, "group_size=32, zero_point='none' takes 4.50"),
        ("gguf", Grid(3, 16, "none", torch.float32, k_quant=True), None, ""),
        ("compressed-tensors", Grid(4, 32, "integer", torch.bfloat16), None, "zero_point='none' takes 4.50"),
        ("compressed-tensors", Grid(4, 128, "integer", torch.bfloat16), None, ""),
        ("mlx", Grid(3, 128, "integer", torch.bfloat16), None, "zero_point='float' takes 3.25"),
    ],
)
def test_what_would_take_no_more_than_it_has(format, grid, in_features, advice):
    assert FORMATS[format].advice(grid, in_features) == advice
