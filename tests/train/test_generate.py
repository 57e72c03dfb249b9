"""Training data that the model makes up itself: what it is made of, and what making it leaves alone."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import VOCAB, perturb, tiny_model
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from peft_dlqat import DLQATConfig
from peft_dlqat.running import adapters_disabled, teacher_logits
from peft_dlqat.train.generate import generate_dataset


def word_tokenizer(**special):
    names = [*special.values(), *(f"w{i}" for i in range(60 - len(special)))]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[-1]))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def generate(model, n=6, tokenizer=None, **options):
    return generate_dataset(model, tokenizer, n, **{"length": 16, "batch_size": 4, "progress": False, **options})


def adapted(bits=2):
    model = get_peft_model(tiny_model(), DLQATConfig(bits=bits, group_size=32, init="minmax", task_type="CAUSAL_LM"))
    perturb(model)
    return model


def test_rows_and_columns():
    data = generate(tiny_model(), 6)
    assert data.column_names == ["input_ids", "attention_mask"] and len(data) == 6
    for row in data:
        assert 2 <= len(row["input_ids"]) <= 16 and len(row["input_ids"]) == len(row["attention_mask"])
        assert set(row["attention_mask"]) == {1} and all(0 <= token < VOCAB for token in row["input_ids"])


def test_the_seed_decides_and_the_callers_random_state_stays():
    model = tiny_model()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = generate(model, seed=5)["input_ids"]
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.manual_seed(2)
    assert generate(model, seed=5)["input_ids"] == first != generate(model, seed=6)["input_ids"]


@pytest.mark.parametrize(
    "setting",
    [{"suppress_tokens": list(range(30))}, {"guidance_scale": 3.0}, {"max_time": 1e-9}, {"stop_strings": ["w1"]}],
    ids=str,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_models_generation_config_changes_nothing_and_stays(setting, wrapped):
    model = adapted() if wrapped else tiny_model()
    expected = generate(model)["input_ids"]
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config
    assert generate(model)["input_ids"] == expected
    assert model.generation_config is before


def test_3_to_5_tokens_are_the_likeliest_and_the_others_are_drawn():
    model = tiny_model()
    rows = [row for row in generate(model, 64, batch_size=32, temperature=5.0)["input_ids"] if len(row) == 16]
    ids = torch.tensor(rows)
    with torch.no_grad():
        likeliest = model(ids).logits.argmax(-1)[:, :-1] == ids[:, 1:]
    assert likeliest[:, 1:4].all()  # after the random token that follows Llama's beginning-of-sequence token
    run = likeliest[:, 1:].int().cumprod(-1).sum(-1)
    assert {3, 4, 5} <= set(run.tolist())
    assert likeliest[:, 6:].float().mean() < 0.3  # a hot distribution over 64 tokens


def test_tokens_are_drawn_from_the_models_distribution():
    """Of the tokens drawn, as many are likeliest as the model gives them probability; its own settings are ignored."""
    model = tiny_model()
    model.generation_config.update(top_k=1, min_p=0.9, repetition_penalty=3.0, max_new_tokens=2, do_sample=False)
    ids = torch.tensor([row for row in generate(model, 300, batch_size=100)["input_ids"] if len(row) == 16])
    with torch.no_grad():
        p = model(ids).logits.softmax(-1)[:, 6:-1]
    hits = (p.argmax(-1) == ids[:, 7:]).float()
    expected, deviation = p.amax(-1).mean(), (p.amax(-1) * (1 - p.amax(-1))).mean().sqrt() / hits.numel() ** 0.5
    assert abs(hits.mean() - expected) < 5 * deviation and expected < 0.9


def test_the_base_model_generates():
    model = adapted()
    with adapters_disabled(model):
        base = generate(model.get_base_model(), 8)["input_ids"]
    assert generate(model, 8)["input_ids"] == base
    assert not any(m._disable_adapters for m in model.modules() if hasattr(m, "dlqat_A"))
    injected = tiny_model()
    injected.add_adapter(DLQATConfig(bits=2, group_size=32, init="minmax"))
    perturb(injected)
    assert generate(injected, 8)["input_ids"] == base
    ids = torch.tensor(base[0])[None]
    assert not torch.allclose(teacher_logits(model, {"input_ids": ids}), model(ids).logits, atol=0.1)


def test_the_models_mode_stays():
    model = adapted().train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    generate(model, 2)
    assert [module.training for module in model.modules()] == modes


def test_a_row_ends_with_the_end_token():
    model = tiny_model()
    tokenizer = word_tokenizer(bos_token="<s>", eos_token="</s>")
    data = generate(model, 200, tokenizer, batch_size=50, temperature=5.0)["input_ids"]
    end = tokenizer.eos_token_id
    ends = [{end, *([model.generation_config.eos_token_id] if model.generation_config.eos_token_id else [])}]
    short = [row for row in data if len(row) < 16]
    assert short and all(row[-1] in ends[0] for row in short)
    assert all(end not in row[2:-1] for row in data)


@pytest.mark.parametrize(
    "special, start",
    [
        ({"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, 0),
        ({"eos_token": "</s>"}, None),
        ({}, None),
    ],
)
def test_tokenizers_with_and_without_special_tokens(special, start):
    tokenizer = word_tokenizer(**special)
    rows = generate(tiny_model(), 40, tokenizer)["input_ids"]
    if start is not None:
        assert all(row[0] == tokenizer.bos_token_id for row in rows)
    firsts = {row[0 if start is None else 1] for row in rows}
    assert not firsts & set(tokenizer.all_special_ids) and len(firsts) > 10
    assert max(firsts) < len(tokenizer) < VOCAB  # the model's vocabulary is padded beyond the tokenizer's


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_other_architectures(kind):
    model = tiny_model(kind)
    rows = generate(model, 4, length=64)["input_ids"]
    assert all(row[0] == model.generation_config.bos_token_id for row in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 0}, "n=0 must be a positive integer"),
        ({"n": 2.0}, "n=2.0 must be"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"length": 65}, "length=65 is above the model's context of 64"),
        ({"length": 2}, "length=2 must be an integer, at least 3"),
        ({"temperature": 0}, "temperature=0 must be a positive number"),
    ],
)
def test_impossible_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), **options)


def test_models_that_cannot_generate():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    )
    for model in (t5, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no causal language model"):
            generate(model)


def test_a_merged_adapter_is_switched_off_too_and_stays_merged():
    model = adapted()
    expected = generate(model, 8)["input_ids"]
    with torch.no_grad():
        own = model(input_ids=torch.tensor(expected[0])[None]).logits
    model.merge_adapter()
    assert generate(model, 8)["input_ids"] == expected
    assert all(m.merged for m in model.modules() if hasattr(m, "dlqat_A"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.tensor(expected[0])[None]).logits, own)


def test_the_package_is_imported_without_datasets():
    blocked = "import sys; sys.modules['datasets'] = None; import peft_dlqat; peft_dlqat.generate_dataset"
    subprocess.run([sys.executable, "-W", "ignore", "-c", blocked], check=True)
