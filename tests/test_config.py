"""A config refuses what cannot be, before there is a model."""

from __future__ import annotations

import pytest
import torch
from refusals import INF, NAN, adapted, refused

from peft_dlqat import DLQATConfig

BITS = ("must be an integer from 2 to 8", "use 4")
GROUP_SIZE = ("must be an integer of at least 1", "-1 for one scale a row")
RANK = ("must be an integer of at least 1", "use 8")
ALPHA = ("must be a positive number", "use r")
ZERO_POINT = "'none', 'integer', 'float'"
SCALE_DTYPE = "'bfloat16', 'float16', 'float32'"
K_QUANT = ("none of GGUF's K-quants", "(Q3_K)", "'bfloat16'")
MAGNITUDE = "'group', 'row', 'none'"

# Of each setting: wrong values, and what is said beside the setting and the value.
VALUES = [
    ("bits", (1, 9, 0, -4, 3.5, 4.0, "3", True, None), BITS),
    ("group_size", (0, -2, 64.0, -1.0, "64", True), GROUP_SIZE),
    ("r", (0, -1, 4.0, True), RANK),
    ("lora_alpha", (0, -16, NAN, INF, "16", True), ALPHA),
    ("zero_point", ("asymmetric", None, True), (ZERO_POINT,)),
    ("scale_dtype", ("int8", torch.bfloat16), (SCALE_DTYPE,)),
    ("method", ("lora", None), ("'dlqat', 'lrqat', 'l4q', 'peqa', 'qalora'",)),
    ("magnitude", ("column", 1), (MAGNITUDE,)),
    ("init", ("gptq",), ("'mse', 'minmax'",)),
    ("storage", ("int3",), ("must be one of", "'full'", "'int8'")),
    ("gradient", ("fp8",), ("must be one of", "'exact'", "'lowrank'")),
    ("export", ("gguf",), ("list of formats", "['gguf']")),
    ("bias", ("lora",), ("'none', 'all', 'dlqat_only'",)),
    ("use_rslora", ("yes",), ("True or False",)),
    ("init_weights", ("gaussian",), ("True or False",)),
    ("bits_pattern", ([3],), ("dict",)),
    ("target_modules", (5,), ("must be a list of module names, or a regex",)),
    ("target_modules", ("(",), ("neither a module name nor a regex",)),
    ("layers_pattern", ("layers",), ("needs layers_to_transform",)),
    ("layers_to_transform", ("1",), ("index",)),
]
# Settings that do not go together, or that are wrong inside, and what is said.
SETTINGS = [
    ({"scale_dtype": "k_quant"}, ("bits=4, zero_point='integer', group_size=128", *K_QUANT)),
    (
        {"scale_dtype": "k_quant", "bits": 3, "zero_point": "none"},
        ("bits=3, zero_point='none', group_size=128", *K_QUANT),
    ),
    ({"scale_dtype": "k_quant", "bits": 8, "zero_point": "none", "group_size": 16}, ("bits=8", *K_QUANT)),
    ({"method": "peqa", "magnitude": False}, ("magnitude=False", "method='peqa'", "leave it at True")),
    ({"method": "qalora", "zero_point": "integer"}, ("zero_point='integer'", "method='qalora'", "use 'float'")),
    ({"storage": "int4", "bits": 8}, ("cannot hold codes of 8 bits", "use 'full' or 'int8'")),
    ({"storage": "int2", "bits": 2, "bits_pattern": {"v_proj": 4}}, ("cannot hold codes of 4 bits",)),
    ({"storage": "int8", "method": "l4q"}, ("trains the step",)),
    ({"gradient": "lowrank"}, ("magnitude='row'",)),
    ({"gradient": "lowrank", "method": "lrqat"}, ("use method='dlqat'",)),
    ({"export": ["ggml"]}, ("export='ggml'", "'compressed-tensors', 'gguf', 'mlx', 'gptq', 'dense'")),
    (
        {"export": ["gguf", "compressed-tensors"], "zero_point": "float"},
        ("compressed-tensors cannot hold bits=4, group_size=128, zero_point='float'", "use zero_point='integer'"),
    ),
    ({"export": ["gguf"], "bits": 3, "group_size": 16}, ("gguf cannot hold", "group_size=16", "use group_size=32")),
    ({"export": ["gguf"], "scale_dtype": "float32"}, ("scale_dtype='float32'", "use scale_dtype='bfloat16'")),
    ({"export": ["gguf"], "bits_pattern": {"down_proj": 8}}, ("bits=8", "use zero_point='none' or bits=7")),
    ({"bits_pattern": {"q_proj": 1}}, ("bits_pattern['q_proj']=1", *BITS)),
    ({"bits_pattern": {"q_proj": "3"}}, ("bits_pattern['q_proj']='3'", *BITS)),
    ({"group_size_pattern": {"q_proj": 0}}, ("group_size_pattern['q_proj']=0", *GROUP_SIZE)),
    ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern['q_proj']=0", *RANK)),
    ({"alpha_pattern": {"q_proj": NAN}}, ("alpha_pattern['q_proj']=nan", *ALPHA)),
    ({"bits_pattern": {"(": 3}}, ("bits_pattern='('", "regex")),
    ({"bits_pattern": {0: 3}}, ("bits_pattern=0", "must be a module name")),
    (
        {"target_modules": ".*_proj", "layers_to_transform": 1},
        ("layers_to_transform=1", "regex", "'.*_proj'", "modules in a list"),
    ),
]
IMPOSSIBLE = [({name: value}, (f"{name}={value!r}", *says)) for name, values, says in VALUES for value in values]


@pytest.mark.parametrize("settings, says", [*IMPOSSIBLE, *SETTINGS], ids=str)
def test_impossible_settings_are_refused(settings, says):
    with refused(ValueError, *says):
        DLQATConfig(**settings)


def test_an_unknown_setting_is_refused():
    with refused(TypeError, "unexpected keyword argument 'group'"):
        DLQATConfig(group=64)


def test_an_unknown_key_in_a_saved_config_is_named(tmp_path):
    """A config of a later version loads, and PEFT's warning names the key that was left out."""
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"bits_per_head": 3, ', 1))
    with pytest.warns(UserWarning, match="bits_per_head"):
        config = DLQATConfig.from_pretrained(str(tmp_path))
    assert config.bits == 4
