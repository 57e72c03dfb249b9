"""What works on a base model's folder refuses what cannot be, and writes nothing into it."""

from __future__ import annotations

import pytest
import torch
from accelerate import disk_offload
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from refusals import refused, small_config

from peft_dlqat import estimate_memory, load_packed


@pytest.fixture
def base(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_packing_in_full_is_refused(base, tmp_path):
    with refused(ValueError, "storage='full' packs nothing", "storage='int8'", folder=tmp_path):
        load_packed(base, small_config())


def test_packing_under_a_lora_adapter_is_refused(base, tmp_path):
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with refused(TypeError, "LORA adapter", "DL-QAT", folder=tmp_path):
        load_packed(base, tmp_path / "adapter")


def test_packing_an_offloaded_base_is_refused(tmp_path):
    base = disk_offload(tiny_model(), tmp_path, execution_device=torch.device("cpu"))
    with refused(ValueError, "cannot pack", "offloaded to the CPU or disk", "load_packed", folder=tmp_path):
        get_peft_model(base, small_config(storage="int8"))


@pytest.mark.parametrize(
    "kwargs, says",
    [
        ({"batch_size": 0}, ("batch_size=0", "positive integer")),
        ({"optimizer": "lion"}, ("'lion'", "'adamw'", "'sgd'")),
    ],
)
def test_an_impossible_estimate_is_refused(kwargs, says, base, tmp_path):
    with refused(ValueError, *says, folder=tmp_path):
        estimate_memory(small_config(), str(base), **{"batch_size": 1, "sequence_length": 8, **kwargs})
