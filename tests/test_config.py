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
    ("group_size", (0, -2, 64.0, -1.0, "64", True, 10**12, torch.ones(2)), GROUP_SIZE),
    ("r", (0, -1, 4.0, True, 2**31 + 1), RANK),
    ("lora_alpha", (0, -16, NAN, INF, "16", True, 1e300, 1e-300, 10**100), ALPHA),
    ("zero_point", ("asymmetric", None, True), (ZERO_POINT,)),
    ("scale_dtype", ("int8", torch.bfloat16), (SCALE_DTYPE,)),
    ("method", ("lora", None), ("'dlqat', 'lrqat', 'l4q', 'peqa', 'qalora'",)),
    ("magnitude", ("column", 1), (MAGNITUDE,)),
    ("init", ("gptq",), ("'mse', 'minmax'",)),
    ("storage", ("int3",), ("must be one of", "'full'", "'int8'")),
    ("gradient", ("fp8",), ("must be one of", "'exact'", "'lowrank'")),
    ("bias", ("lora",), ("'none', 'all', 'dlqat_only'",)),
    ("use_rslora", ("yes",), ("True or False",)),
    ("init_weights", ("gaussian",), ("True or False",)),
    ("bits_pattern", ([3], 0, False, ""), ("dict",)),
    ("modules_to_save", ("lm_head", 3, [3], [None]), ("list of module names",)),
    ("task_type", (3, True, []), ("must be a string",)),
    ("base_model_name_or_path", (3, ["a"]), ("must be a string",)),
    ("revision", (3, b"main"), ("must be a string",)),
    ("inference_mode", (None, "no", 1), ("True or False",)),
    ("auto_mapping", ([], "x"), ("dict",)),
    ("export", ("gguf", 3, {"gguf": 1}), ("list of formats", "['gguf']")),
    ("layers_pattern", (3, [3]), ("list of module names",)),
    ("layers_to_transform", (-1, 1.0, [True], [[1]], 2**40), ("index",)),
    ("target_modules", (5,), ("must be a list of module names, or a regex",)),
    ("target_modules", ("(",), ("neither a module name nor a regex",)),
    ("layers_pattern", ("layers",), ("needs layers_to_transform",)),
    ("layers_to_transform", ("1",), ("index",)),
]
# Settings that do not go together, or that are wrong inside, and what is said.
SETTINGS = [
    ({"scale_dtype": "k_quant"}, ("bits=4, zero_point='none', group_size=128", *K_QUANT)),
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
    ({"export": ["ggml"]}, ("export='ggml'", "'compressed-tensors', 'gguf', 'mlx', 'gptq', 'awq', 'dense'")),
    (
        {"export": ["gguf", "compressed-tensors"], "zero_point": "float"},
        ("compressed-tensors cannot hold bits=4, group_size=128, zero_point='float'", "use zero_point='integer'"),
    ),
    ({"export": ["gguf"], "bits": 3, "group_size": 16}, ("gguf cannot hold", "group_size=16", "use group_size=32")),
    ({"export": ["gguf"], "scale_dtype": "float32"}, ("scale_dtype='float32'", "use scale_dtype='bfloat16'")),
    (
        {"export": ["gguf"], "zero_point": "integer", "bits_pattern": {"down_proj": 8}},
        ("bits=8", "use zero_point='none' or bits=7"),
    ),
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


DEEP = b'{"record": ' + b"[" * 30 + b"]" * 30 + b"}"
FILES = {
    "no JSON": (b"{", "cannot be read"),
    "no text": (b"\xff\xfe\xff", "cannot be read"),
    "no object": (b"[1]", "names no method that PEFT knows, but [1]"),
    "a number": (b"3", "cannot be read"),
    "too deep to be read": (b"[" * 100_000 + b"]" * 100_000, "cannot be read"),
    "too deep to be copied": (DEEP, "30 levels deep, and a config at most 20"),
    "another method": (b'{"peft_type": "MORE"}', "no method that PEFT knows, but 'MORE'"),
    "no method": (b'{"peft_type": [3]}', "but [3]"),
    "a wrong value": (b'{"peft_type": "DLQAT", "bits": 1}', "bits=1 must be an integer from 2 to 8; use 4"),
    "a large number": (b'{"peft_type": "DLQAT", "r": 1' + b"0" * 5000 + b"}", "cannot be read"),
    "an infinite number": (b'{"peft_type": "DLQAT", "lora_alpha": 1e999}', "lora_alpha=inf must be"),
    "no settings": (b'{"peft_type": "DLQAT", "cls": 3}', "multiple values"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_config_is_named(name, tmp_path):
    content, says = FILES[name]
    (tmp_path / "adapter_config.json").write_bytes(content)
    with refused(ValueError, f"{tmp_path}/adapter_config.json", says, folder=tmp_path):
        DLQATConfig.from_pretrained(str(tmp_path))


def test_a_value_that_peft_shows_whole_is_cut(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "DLQAT", "task_type": "' + 9999 * "(" + '"}')
    with pytest.raises(ValueError, match="Invalid task type") as error:
        DLQATConfig.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 2000


def test_a_file_too_large_for_a_config_is_not_read(tmp_path):
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(2**35)
    with refused(ValueError, "adapter_config.json has 34,359,738,368 bytes, and a config at most"):
        DLQATConfig.from_pretrained(str(tmp_path))


def test_more_names_than_a_model_has_are_refused():
    with refused(ValueError, "target_modules has 100,001 entries", "use a regex"):
        DLQATConfig(target_modules=["a"] * 100_001)


@pytest.mark.parametrize("name", ["all-linear", "All-Linear", None])
def test_all_linear_in_any_case(name):
    assert DLQATConfig(target_modules=name).target_modules == "all-linear"
