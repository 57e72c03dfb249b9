"""Settings by what a model is served with."""

import pytest
import torch
from conftest import tiny_model
from peft import get_peft_model

from peft_dlqat import DLQATConfig
from peft_dlqat.formats import FORMATS

PRESETS = [(format, preset) for format in FORMATS.values() for preset in format.presets]


@pytest.mark.parametrize(
    ("format", "preset"), PRESETS, ids=[f"{p.engine}-{p.type or p.settings['bits']}" for _, p in PRESETS]
)
def test_its_format_holds_it_in_about_the_bits_it_has(format, preset):
    config = DLQATConfig.for_engine(preset.engine, preset.type or None, preset.settings["bits"])
    assert config.export == [format.name]
    (grid,) = config.grids()
    assert format.problem(grid, (512, 512)) == "" and format.advice(grid, 512) == ""
    name, bits = format.stored_as(grid)
    assert bits <= grid.bits_per_weight() + 0.25
    assert name == (preset.type or name)


def test_what_an_engine_is_asked_for():
    q3_k = DLQATConfig.for_engine("llama.cpp", "Q3_K", r=16, task_type="CAUSAL_LM")
    assert (q3_k.bits, q3_k.scale_dtype, q3_k.group_size, q3_k.r, q3_k.task_type) == (
        3,
        "k_quant",
        16,
        16,
        "CAUSAL_LM",
    )
    assert DLQATConfig.for_engine("llama.cpp", bits=3) == DLQATConfig.for_engine("llama.cpp", "Q3_K")
    assert DLQATConfig.for_engine("vllm").bits == 4
    # vLLM's kernels of 2 and 3 bits are symmetric only.
    assert all(DLQATConfig.for_engine("vllm", bits=bits).zero_point == "none" for bits in (2, 3, 4, 8))
    assert DLQATConfig.for_engine("mlx", bits=3, group_size=64).group_size == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ollama",), "engine='ollama' must be one of .*'vllm'"),
        (("llama.cpp", "Q4_K_M"), "nothing with type='Q4_K_M'; it has types .*'Q4_K'"),
        (("llama.cpp", "Q4_K", 3), "nothing with type='Q4_K' and bits=3"),
        (("vllm", None, 5), "nothing with bits=5; it has no types, but bits 2, 3, 4, 8"),
    ],
)
def test_what_there_is_not_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DLQATConfig.for_engine(*arguments)


def test_a_model_that_it_does_not_fit_is_refused_at_injection():
    with pytest.raises(ValueError, match="not a multiple of 256"):
        get_peft_model(tiny_model(), DLQATConfig.for_engine("llama.cpp", "Q3_K"))
    odd = torch.nn.Sequential(torch.nn.Linear(48, 48))
    with pytest.raises(ValueError, match=r"export=.'gptq'.: 0: gptq cannot pack a weight of 48 x 48"):
        get_peft_model(odd, DLQATConfig.for_engine("gptqmodel", target_modules=["0"]))
