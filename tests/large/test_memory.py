"""The estimated memory of a training step is close to what the allocator really hands out."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from conftest import say_calibrated, tiny_model
from gguf_files import write_gguf
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_dlqat import DLQATConfig, estimate_memory, load_quantized, pack_weights

ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADY = {**SMALL, "vocab_size": 8000, "num_hidden_layers": 3, "tie_word_embeddings": True}
# Of which the reference op takes several pieces.
BROAD = {
    "hidden_size": 512,
    "intermediate_size": 8192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
}

# shapes, config, batch, length, gradient checkpointing and dtype
CASES = {
    "full": (SMALL, {}, 2, 128, False, torch.float32),
    "full, bfloat16": (SMALL, {}, 2, 256, True, torch.bfloat16),
    "int8, checkpoints": (SMALL, {"storage": "int8"}, 4, 128, True, torch.float32),
    "int4, r=64": (SMALL, {"storage": "int4", "r": 64, "modules_to_save": ["lm_head"]}, 2, 128, False, torch.float32),
    "int4, lowrank": (SMALL, {"storage": "int4", "gradient": "lowrank", "magnitude": "row"}, 2, 128, True,
                      torch.float32),
    "int4, several pieces": (BROAD, {"storage": "int4", "zero_point": "float"}, 1, 64, True, torch.float32),
    "peqa": (BROAD, {"method": "peqa"}, 1, 64, True, torch.float32),
    "large vocabulary": (HEADY, {"storage": "int4"}, 2, 128, True, torch.float32),
}  # fmt: skip


def peak_bytes(call):
    """The most bytes that the CPU's allocator has handed out at once during a call, above what it had before."""
    gc.collect()  # what falls to the collector during the call would be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.product(every=4)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_within_a_tenth_of_what_is_measured(case):
    shapes, changes, batch, length, checkpointing, dtype = CASES[case]
    model_config = LlamaConfig(**{"vocab_size": 1000, "num_hidden_layers": 4, **shapes})
    config = DLQATConfig(bits=3, init="minmax", task_type="CAUSAL_LM", **changes)
    found = estimate_memory(config, model_config, batch, length, checkpointing, dtype, device="cpu")
    assert (found.head >= found.temporaries) == (case == "large vocabulary")

    model = get_peft_model(AutoModelForCausalLM.from_config(model_config, dtype=dtype), config).train()
    pack_weights(model)
    say_calibrated(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 1000, (batch, length))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step():
        model(input_ids=ids, labels=ids).loss.backward()

    step()  # what is made once
    optimizer.step()
    optimizer.zero_grad()
    tensors = [*model.parameters(), *model.buffers()]
    states = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    static = sum(tensor.nbytes for tensor in [*tensors, *states])
    assert found.static == static
    measured = peak_bytes(step)
    print(
        f"measured {measured / 1e6:.2f} MB, estimated {(found.total - static) / 1e6:.2f} MB beside {static / 1e6:.2f}"
    )
    assert found.total == pytest.approx(static + measured, rel=0.03 if checkpointing else 0.06)
    # Not only the sum: what is beside the weights, too.
    assert found.total - static == pytest.approx(measured, rel=0.1)


@pytest.mark.product
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("length", [8, 256])
def test_a_whole_step_with_its_optimiser(accumulate, length):
    """With few tokens the optimiser's own step is the highest point, with many the backward pass."""
    model_config = LlamaConfig(**SMALL, vocab_size=1000, num_hidden_layers=4)
    config = DLQATConfig(bits=3, init="minmax", r=64, storage="int4", task_type="CAUSAL_LM")
    # On these small layers the two devices differ in the optimiser alone.
    found = estimate_memory(
        config, model_config, 1, length, False, torch.float32, device="cuda", gradient_accumulation_steps=accumulate
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(model_config), config).train()
    pack_weights(model)
    say_calibrated(model)
    ids = torch.randint(0, 1000, (1, length))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)

    def step():
        for _ in range(accumulate):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # what is made once
    in_update = found.total == found.static + found.gradients + found.update
    assert in_update == (length == 8) and (found.accumulated > 0) == (accumulate > 1)
    assert found.total - found.static == pytest.approx(peak_bytes(step), rel=0.1)


@pytest.mark.slow
def test_parts_are_what_they_say():
    model_config = LlamaConfig(**SMALL, vocab_size=1000, num_hidden_layers=3)
    arguments = model_config, 1, 64
    full, int8, int4 = (
        estimate_memory(DLQATConfig(bits=3, storage=storage, task_type="CAUSAL_LM"), *arguments)
        for storage in ("full", "int8", "int4")
    )
    assert full.frozen == 2 * int8.frozen == 4 * int4.frozen
    assert full.adapter == full.gradients == full.optimizer / 2 == int4.adapter
    assert (full.scales_and_zeros, full.rest) == (int4.scales_and_zeros, int4.rest)
    assert str(full).count("GiB") == 12
    # In double the batch, what depends on it doubles.
    two = estimate_memory(DLQATConfig(bits=3, task_type="CAUSAL_LM"), model_config, 2, 64)
    assert two.activations == pytest.approx(2 * full.activations, rel=0.05) and two.static == full.static
    eight_bits = estimate_memory(DLQATConfig(bits=3, task_type="CAUSAL_LM"), *arguments, optimizer="adamw_8bit")
    assert full.static - eight_bits.static == 6 * full.adapter // 4


def test_layers_that_are_not_adapted_stay_as_they_are():
    model_config = LlamaConfig(**SMALL, vocab_size=1000, num_hidden_layers=3)
    one = DLQATConfig(bits=3, storage="int4", layers_to_transform=[1], task_type="CAUSAL_LM")
    found = estimate_memory(one, model_config, 1, 8)
    whole = estimate_memory(DLQATConfig(bits=3, storage="int4", task_type="CAUSAL_LM"), model_config, 1, 8)
    assert 3 * found.frozen == whole.frozen and 3 * found.adapter == whole.adapter
    assert found.rest == whole.rest + 2 * 4 * found.frozen  # in bfloat16


def test_a_folder_will_do(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    config = DLQATConfig(bits=3, group_size=32, task_type="CAUSAL_LM")
    assert estimate_memory(config, str(tmp_path), 1, 8) == estimate_memory(config, tiny_model().config, 1, 8)


@pytest.mark.parametrize("arguments,message", [((0, 8), "batch_size=0"), ((1, -1), "sequence_length=-1")])
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(DLQATConfig(task_type="CAUSAL_LM"), tiny_model().config, *arguments)


@pytest.mark.parametrize("argument,value", [("optimizer", "lion"), ("device", "tpu")])
def test_an_unknown_choice(argument, value):
    with pytest.raises(ValueError, match=f"{argument}='{value}' must be one of"):
        estimate_memory(DLQATConfig(task_type="CAUSAL_LM"), tiny_model().config, 1, 8, **{argument: value})


def test_another_task_is_refused():
    with pytest.raises(ValueError, match="task_type='SEQ_CLS': only causal language models"):
        estimate_memory(DLQATConfig(task_type="SEQ_CLS"), tiny_model().config, 1, 8)


@pytest.mark.slow
def test_the_page_holds_what_the_script_prints(monkeypatch):
    """Of the first table one model; of the second, which takes minutes, the shortest sequences of that."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "memory")
    import plan

    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert "\n".join(plan.parts_table(["7B"])) in page
    monkeypatch.setattr(plan, "LENGTHS", plan.LENGTHS[:1])
    assert "\n".join(plan.batch_table(["7B"])) in re.sub(r" / [\d-]+ / [\d-]+ \|", " |", page)
    assert plan.laptop_row("1B") in (ROOT / "docs" / "laptop.md").read_text(encoding="utf-8")


# shapes, mixture, gradient checkpointing and dtype
FILES = {
    "Q4_K_M, bfloat16": ({**SMALL, "intermediate_size": 512}, "Q4_K_M", True, torch.bfloat16),
    "Q8_0": (SMALL, "Q8_0", False, torch.float32),
}


@pytest.mark.product(every=2)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", FILES)
def test_of_a_quantized_file(case, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    shapes, mixture, checkpointing, dtype = FILES[case]
    model_config = LlamaConfig(**{"vocab_size": 1024, "num_hidden_layers": 4, **shapes})
    model_config.save_pretrained(tmp_path)
    path = write_gguf(AutoModelForCausalLM.from_config(model_config), tmp_path / "small.gguf", mixture)
    config = DLQATConfig(task_type="CAUSAL_LM")
    found = estimate_memory(config, str(path), 2, 128, checkpointing, dtype, device="cpu", base=tmp_path)
    model = load_quantized(path, config, base=tmp_path, dtype=dtype)[0].train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 1000, (2, 128))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step():
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    states = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    static = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *states])
    assert found.static == static
    measured = peak_bytes(step)
    print(
        f"measured {measured / 1e6:.2f} MB, estimated {(found.total - static) / 1e6:.2f} MB beside {static / 1e6:.2f}"
    )
    assert found.total == pytest.approx(static + measured, rel=0.1)
