"""Held-out figures and tasks, against plain computations of the same."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB, lm_batches, perturb, tiny_model, tokens, units_of
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig

import peft_dlqat.train.divergence
from peft_dlqat import DLQATConfig, DLQATLayer
from peft_dlqat import layer as layer_module
from peft_dlqat.evaluate import TASK_SETS, evaluate_model, evaluate_tasks, resolve_tasks
from peft_dlqat.running import adapters_disabled

EXAMPLES = Path(__file__).parents[1] / "examples"
TASKS = EXAMPLES / "tasks"
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install peft-dlqat[eval]"
)


def adapted(kind="llama", bits=3):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(kind), DLQATConfig(bits=bits, group_size=32, init="minmax"))
    perturb(model)
    return model


def masked_batches():
    """Labels that leave some tokens out, and padding on the right."""
    batches = lm_batches(3)
    batches[0]["labels"][0, :7] = -100
    batches[1]["labels"][1:, 10:] = -100
    batches[1]["attention_mask"][1:, 10:] = 0
    return batches


def plainly(model, batches, teacher=None):
    """KL, loss, agreement and count, token by token in float64."""
    kl, loss, same = [], [], []
    with torch.no_grad():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            q = model(**inputs).logits.double().log_softmax(-1)
            p = q if teacher is None else teacher(inputs).double().log_softmax(-1)
            for row, labels in enumerate(batch["labels"]):
                for position, label in enumerate(labels[1:].tolist()):
                    if label != -100:
                        a, b = p[row, position], q[row, position]
                        kl.append((a.exp() * (a - b)).sum().item())
                        loss.append(-b[label].item())
                        same.append(a.argmax() == b.argmax())
    return np.mean(kl), np.mean(loss), np.mean(same), len(loss)


def base_model(model):
    def run(inputs):
        with adapters_disabled(model):
            return model(**inputs).logits

    return run


def everything(model):
    """What must be as before: the tensors themselves (not only their values), modes and merged adapters."""
    state = {name: (id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    merged = [list(m.merged_adapters) for m in model.modules() if isinstance(m, DLQATLayer)]
    return state, modes, merged


def assert_same(before, after):
    assert before[1:] == after[1:]
    for name, (identity, pointer, value) in before[0].items():
        assert after[0][name][:2] == (identity, pointer), name
        assert torch.equal(after[0][name][2], value), name


# Held-out figures


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2: Conv1D, whose weight is stored transposed
@pytest.mark.parametrize("chunk", [None, 5 * VOCAB])
def test_figures_of_an_adapter(kind, chunk, monkeypatch):
    model = adapted(kind)
    kl, loss, agreement, count = plainly(model, masked_batches(), base_model(model))
    if chunk:
        monkeypatch.setattr(peft_dlqat.train.divergence, "_CHUNK_ELEMENTS", chunk)
    result = evaluate_model(model, iter(masked_batches()))
    assert result.tokens == count and count < 3 * 4 * 15
    assert result.kl == pytest.approx(kl, rel=1e-4) and kl > 0.01
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert result.agreement == pytest.approx(agreement) and 0 < agreement < 1
    assert f"{count} tokens" in str(result) and f"KL {result.kl:.4g}" in str(result)


@pytest.mark.parametrize("merged", [False, True])
def test_the_model_is_left_as_it_was(merged):
    model = adapted()
    if merged:
        model.merge_adapter()
    model.train()
    next(m for m in model.modules() if isinstance(m, DLQATLayer)).training = False
    before = everything(model)
    evaluate_model(model, lm_batches(2))
    assert_same(before, everything(model))
    if merged:
        model.unmerge_adapter()
    fresh = adapted()
    for batch in lm_batches(1):
        assert torch.equal(model.eval()(**batch).logits, fresh.eval()(**batch).logits)
    assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


def test_merged_or_not_is_the_same():
    model = adapted()
    result = evaluate_model(model, masked_batches())
    model.merge_adapter()
    assert evaluate_model(model, masked_batches()) == result
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    alone = evaluate_model(merged, masked_batches())
    assert (alone.kl, alone.agreement) == (None, None) and "KL" not in str(alone)
    assert (alone.loss, alone.perplexity, alone.tokens) == (result.loss, result.perplexity, result.tokens)
    assert evaluate_model(merged, masked_batches(), teacher=tiny_model()) == result


def test_layers_quantize_once_for_all_batches(monkeypatch):
    """Which is what merging is for; with the teacher's passes in between."""
    model, merges = adapted(), []
    merge = DLQATLayer.merge
    monkeypatch.setattr(DLQATLayer, "merge", lambda self, *a, **k: (merges.append(self), merge(self, *a, **k)))
    made, faked = [], []
    harden, fake = layer_module.harden, layer_module.fake_quantize_linear
    monkeypatch.setattr(layer_module, "harden", lambda *a: (made.append(1), harden(*a))[1])
    monkeypatch.setattr(layer_module, "fake_quantize_linear", lambda *a, **k: (faked.append(1), fake(*a, **k))[1])
    evaluate_model(model, lm_batches(4))
    layers = [m for m in model.modules() if isinstance(m, DLQATLayer)]
    assert len(merges) == len(set(map(id, merges))) == len(layers) == len(made)
    assert not faked
    model(**lm_batches(1)[0])
    assert len(faked) == len(layers)  # the count sees what it should


def test_an_error_leaves_the_model_as_it_was():
    model = adapted().train()
    before = everything(model)
    with pytest.raises(ValueError, match="must be a dict"):
        evaluate_model(model, [*lm_batches(1), [1, 2]])
    assert_same(before, everything(model))


def test_switched_off_adapters_are_the_base_model():
    model = adapted()
    with adapters_disabled(model):
        result = evaluate_model(model, lm_batches(1))
    assert result.kl == 0 and result.agreement == 1
    assert result.loss == evaluate_model(tiny_model(), lm_batches(1)).loss


def test_another_model_as_the_teacher():
    """Whose adapters are merged as well, and which is left in its mode."""
    model, teacher = adapted(bits=2), adapted(bits=4).train()
    before = everything(teacher)
    result = evaluate_model(model, masked_batches(), teacher=teacher)
    assert_same(before, everything(teacher))
    teacher.eval()
    kl, *_ = plainly(model, masked_batches(), lambda inputs: teacher(**inputs).logits)
    assert result.kl == pytest.approx(kl, rel=1e-4)
    own, _, _, _ = plainly(model, masked_batches(), base_model(model))
    assert abs(own - kl) > 0.01 * kl


def test_a_model_without_dlqat_adapters():
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    result = evaluate_model(lora, masked_batches())
    _, loss, _, _ = plainly(lora, masked_batches())
    assert result.kl is None and result.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_labels_padding_does_not_count(side):
    """As if each row were alone, without padding."""
    model, ids, lengths = adapted(), tokens(3, 12), [12, 7, 3]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = evaluate_model(model, [{"input_ids": ids, "attention_mask": mask, "position_ids": positions}])
    alone = evaluate_model(model, [{"input_ids": row[kept.bool()][None]} for row, kept in zip(ids, mask, strict=True)])
    assert padded.tokens == alone.tokens == sum(lengths) - 3
    assert padded.loss == pytest.approx(alone.loss, rel=1e-4) and padded.kl == pytest.approx(alone.kl, rel=1e-3)


def test_infinite_perplexity():
    model = tiny_model()
    model.lm_head.weight.data *= 1e5
    result = evaluate_model(model, lm_batches(1))
    assert result.loss > 710 and result.perplexity == math.inf


def other_vocabulary():
    return AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        (iter(()), "no batches"),
        ([torch.ones(2, 3).long()], "a batch is a Tensor, but must be a dict"),
        (lm_batches(1)[0], "a batch is a str, but must be a dict"),
        ([{"inputs_embeds": torch.zeros(1, 4, 64)}], r"\['inputs_embeds'\] does not say which tokens come next"),
        ([{"input_ids": tokens(), "labels": torch.full((4, 16), -100)}], "no batch has a token to predict"),
        ([{"input_ids": tokens(length=1)}], "no batch has a token to predict"),
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(adapted(), batches)


def test_bad_models():
    model = adapted()
    with pytest.raises(ValueError, match="vocabulary of 64 tokens and the teacher one of 32"):
        evaluate_model(model, [{"input_ids": tokens() % 32}], teacher=other_vocabulary())
    with pytest.raises(ValueError, match="the teacher contains the model's own adapters"):
        evaluate_model(model, lm_batches(1), teacher=model.get_base_model())
    classifier = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ValueError, match="BertForSequenceClassification is no causal language model"):
        evaluate_model(classifier, [{"input_ids": tokens()}])


# Tasks


def test_named_sets():
    assert resolve_tasks("mmlu") == ["mmlu"]
    assert resolve_tasks(["piqa", "commonsense"]) == ["piqa", *(t for t in TASK_SETS["commonsense"] if t != "piqa")]
    with pytest.raises(ValueError, match=r"tasks=\[\] names no task"):
        resolve_tasks([])


def test_harness_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install peft-dlqat\[eval\]"):
        evaluate_tasks(tiny_model(), None, "piqa")


def test_the_questions_are_those_of_the_script():
    spec = importlib.util.spec_from_file_location("make_facts", TASKS / "make_facts.py")
    make_facts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_facts)
    questions = facts()
    assert make_facts.questions() == questions == list(make_facts.load(version=1.0)["test"])
    assert len(questions) > 60
    for question in questions:
        assert len(set(question["choices"])) == 4 and 0 <= question["answer"] < 4


def facts():
    return [json.loads(line) for line in (TASKS / "small_facts.jsonl").read_text(encoding="utf-8").splitlines()]


def direct_accuracy(model, tokenizer, questions):
    """Accuracy by the sum of a choice's log-probabilities after the question."""
    right = 0
    for question in questions:
        texts = [f"{question['question']} {choice}" for choice in question["choices"]]
        encoded = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
        rows = [torch.tensor(each["input_ids"]) for each in encoded]
        with torch.no_grad():  # what stands after a choice is not seen by it
            log_p = model(input_ids=pad_sequence(rows, batch_first=True)).logits.double().log_softmax(-1)
        scores = []
        for ids, each, row in zip(rows, encoded, log_p, strict=True):
            start = next(i for i, (at, _) in enumerate(each["offset_mapping"]) if at >= len(question["question"]))
            scores.append(row[range(start - 1, len(ids) - 1), ids[start:]].sum().item())
        right += max(range(4), key=scores.__getitem__) == question["answer"]
    return right / len(questions)


def embedded():
    folder = EXAMPLES / "embedded" / "model"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@needs_harness
@pytest.mark.slow
def test_task_without_a_download(monkeypatch):
    """The harness's accuracy is that of a plain computation, for an adapter and for its merged copy."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    base, tokenizer = embedded()
    tokenizer.pad_token = None
    model = get_peft_model(base, DLQATConfig(bits=2, group_size=32, init="minmax")).train()
    perturb_codes(model)
    before, states = everything(model), (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    results = evaluate_tasks(model, tokenizer, "small_facts", include_path=TASKS, batch_size=16)
    assert_same(before, everything(model))
    assert tokenizer.pad_token is None
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()

    merged = model.merge_and_unload().eval()
    assert evaluate_tasks(merged, tokenizer, ["small_facts"], include_path=TASKS, batch_size=1) == results
    accuracy = direct_accuracy(merged, tokenizer, facts())
    assert accuracy != direct_accuracy(embedded()[0], tokenizer, facts())  # so the base was not measured
    error = math.sqrt(accuracy * (1 - accuracy) / (len(facts()) - 1))
    assert results == {"small_facts": {"acc": pytest.approx(accuracy), "acc_stderr": pytest.approx(error)}}


def perturb_codes(model):
    """Move the low-rank factors far enough from their start to change the answers."""
    generator, units = torch.Generator().manual_seed(0), units_of(model)
    for name, parameter in model.named_parameters():
        if "dlqat_B" in name:
            parameter.data += 0.02 / units[parameter] * torch.randn(parameter.shape, generator=generator)


@needs_harness
def test_limit_and_bad_names(tmp_path):
    base, tokenizer = embedded()
    results = evaluate_tasks(base, tokenizer, "small_facts", include_path=TASKS, limit=8)
    assert results["small_facts"]["acc"] == direct_accuracy(base, tokenizer, facts()[:8])
    with pytest.raises(ValueError, match="is no folder"):
        evaluate_tasks(base, tokenizer, "small_facts", include_path=tmp_path / "none")


@needs_harness
@pytest.mark.slow  # the harness looks through its thousands of tasks
def test_every_named_task_is_the_harness_s_own(tmp_path):
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    assert {name for names in TASK_SETS.values() for name in names} <= known
    with pytest.raises(ValueError, match="has no task 'no_such_task', nor is it in"):
        evaluate_tasks(tiny_model(), None, ["piqa", "no_such_task"], include_path=tmp_path)
