"""Lists of module names in few words."""

import pytest

from peft_dlqat.module_names import folded

LAYERS = [f"model.layers.{i}.mlp.{name}" for i in range(30) for name in ("gate_proj", "up_proj")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (LAYERS, "gate_proj, up_proj in 30 layers"),
        (["x.0.down", "lm_head", *LAYERS], "x.0.down, lm_head; gate_proj, up_proj in 30 layers"),
        (["a.b", "c"], "a.b, c"),
        ([f"experts.{i}" for i in range(8)], "experts.* in 8 layers"),
        ([f"x.{i}.{name}" for i in range(2) for name in "abcdefgh"], "a, b, c, d, e, f, ... in 2 layers"),
        ([], ""),
    ],
)
def test_what_differs_by_a_number_is_counted(names, expected):
    assert folded(names) == expected
