"""The distillation loss, the object that brings it into a Trainer, and the teacher's cache."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from conftest import VOCAB, lm_batches, perturb, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import peft_dlqat.train.divergence
import peft_dlqat.train.teacher_cache
import peft_dlqat.train.teacher_store
from peft_dlqat import DLQATCallback, DLQATConfig, calibrate, distillation_loss, evaluate_model
from peft_dlqat.layer import adapter_layers
from peft_dlqat.placement import device_of
from peft_dlqat.running import teacher_logits
from peft_dlqat.train.distillation import DistillationLoss
from peft_dlqat.train.divergence import TopTokens, token_divergence
from peft_dlqat.train.model_loss import batch_loss as calibration_loss
from peft_dlqat.train.teacher_cache import TeacherCache
from peft_dlqat.train.teacher_store import EntryFolder, base_fingerprint

# Training on the initial scales and zeros, to keep the tests short.
pytestmark = pytest.mark.filterwarnings("ignore:.*never calibrated")


def adapted(kind="llama", **config):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(kind), DLQATConfig(**{"bits": 2, "group_size": 32, "init": "minmax", **config}))


def pair(shape=(3, 7, 11), dtype=torch.float32, spread=3.0):
    """Logits of a model, which take a gradient, and of a teacher."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (spread * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return logits.requires_grad_(True), teacher


def some_labels(shape=(3, 7), vocabulary=11):
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))
    labels[0, :4] = -100
    labels[2, 5:] = -100
    return labels


def formula(logits, teacher, labels, reverse):
    """The loss, plainly, in float64; its gradient is autograd's."""
    p, q = teacher.double().softmax(-1), logits.double().softmax(-1)
    forward, backward = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    counts = labels[:, 1:] != -100
    values = ((1 - reverse) * forward + reverse * backward)[:, :-1]
    return values[counts].mean()


# The loss itself


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0, 1, "confidence"])
@pytest.mark.parametrize("chunk", [None, 33])  # 33: 3 tokens at a time
def test_value_and_gradient(reverse, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(peft_dlqat.train.divergence, "_CHUNK_ELEMENTS", chunk)
    logits, teacher = pair()
    labels = some_labels()
    loss = distillation_loss(logits, teacher, labels, reverse=reverse)
    loss.backward()
    gradient, logits.grad = logits.grad, None
    if reverse == "confidence":
        reverse = teacher.softmax(-1).amax(-1)[:, :-1][labels[:, 1:] != -100].mean().item()
        assert 0.3 < reverse < 0.95
    expected = formula(logits, teacher, labels, reverse)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, logits.grad, rtol=1e-4, atol=1e-7) and gradient.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 5 * VOCAB])
def test_forward_divergence_is_to_the_bit_that_of_the_plain_code(dtype, chunk, monkeypatch):
    """As published results were made by it, and calibration by the default."""
    if chunk:
        monkeypatch.setattr(peft_dlqat.train.divergence, "_CHUNK_ELEMENTS", chunk)
    logits, teacher = pair((3, 16, VOCAB), dtype)
    labels = some_labels((3, 16), VOCAB)
    loss = distillation_loss(logits, teacher, labels)
    loss.backward()
    gradient, logits.grad = logits.grad, None
    log_p, log_q = teacher.float().log_softmax(-1), logits.float().log_softmax(-1)
    values = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    counts = F.pad(labels[:, 1:] != -100, (0, 1), value=False)
    plain = (values * counts).sum() / counts.sum().clamp(min=1)
    plain.backward()
    assert torch.equal(loss, plain) and torch.equal(gradient, logits.grad)
    assert torch.equal(distillation_loss(logits, teacher), values.mean())
    mask = torch.ones(3, 16).long()
    mask[1, 9:] = 0
    assert torch.equal(distillation_loss(logits, teacher, mask=mask), (values * mask).sum() / mask.sum())


def test_chunks_are_not_all_kept_for_the_backward_pass(monkeypatch):
    """What autograd keeps is the two arguments, and nothing of the vocabulary's size beside."""
    logits, teacher = pair((4, 16, VOCAB))

    def kept(chunk):
        monkeypatch.setattr(peft_dlqat.train.divergence, "_CHUNK_ELEMENTS", chunk)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t, lambda t: t
        ):
            loss = distillation_loss(logits, teacher, reverse=0.5)
        own = {logits.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
        return sum(size for pointer, size in sizes.items() if pointer not in own), loss

    whole, in_chunks = kept(2**24), kept(8 * VOCAB)
    assert whole[0] > logits.nbytes and in_chunks[0] < logits.nbytes / 4
    assert in_chunks[1].item() == pytest.approx(whole[1].item(), rel=1e-6)


def test_a_mask_of_flat_positions_counts():
    logits, teacher = (tensor.detach()[0] for tensor in pair())
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1])
    expected = distillation_loss(logits[None], teacher[None], mask=mask[None])
    assert distillation_loss(logits, teacher, mask=mask) == expected != distillation_loss(logits, teacher)


def test_labels_and_masks_of_another_shape_are_refused():
    logits, teacher = pair()
    for given in ({"labels": some_labels()[:, :-1]}, {"labels": some_labels().flatten()}, {"mask": torch.ones(3, 6)}):
        with pytest.raises(ValueError, match=r"must have that of the logits' positions, \[3, 7\]"):
            distillation_loss(logits, teacher, **given)


def test_a_teacher_of_another_vocabulary_is_refused_and_no_items_give_no_infinity():
    logits, teacher = pair()
    with pytest.raises(ValueError, match=r"teacher's logits \[3, 7, 4\] must have the model's shape \[3, 7, "):
        distillation_loss(logits, teacher[..., :4])
    assert distillation_loss(logits, teacher, num_items=0) == distillation_loss(logits, teacher, num_items=1)


def test_what_does_not_count_may_be_nan_and_what_is_impossible_adds_nothing():
    logits, teacher = (tensor.detach() for tensor in pair())
    mask = torch.ones(3, 7).long()
    mask[0, :3] = 0
    expected = distillation_loss(logits, teacher, mask=mask)
    logits[0, :3] = torch.nan
    assert distillation_loss(logits, teacher, mask=mask) == expected
    logits, teacher = pair()
    wider = [F.pad(tensor, (0, 2), value=-torch.inf) for tensor in (logits, teacher)]
    wide, narrow = distillation_loss(*wider, reverse=0.5), distillation_loss(logits, teacher, reverse=0.5)
    assert wide.item() == pytest.approx(narrow.item(), rel=1e-6)
    (gradient,), (expected,) = torch.autograd.grad(wide, logits), torch.autograd.grad(narrow, logits)
    torch.testing.assert_close(gradient, expected)
    impossible = logits.detach().clone()
    impossible[0, 0, 0] = -torch.inf  # for the model, though not for its teacher
    assert distillation_loss(impossible, teacher) == torch.inf


@pytest.mark.parametrize("reverse", [-0.1, 1.5, True, "cakld", None, float("nan")])
def test_an_impossible_direction(reverse):
    with pytest.raises(ValueError, match=r"reverse=.* must be a number from 0"):
        distillation_loss(*pair(), reverse=reverse)


# A teacher known by its likeliest tokens


@pytest.mark.parametrize("reverse", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 3, 10, 11, 20])
def test_top_tokens(k, reverse):
    """Gradient and value of the coarse divergence: at most the full one, and equal where all tokens are kept."""
    logits, teacher = pair()
    coarse = token_divergence(logits, TopTokens.of(teacher, k), reverse)
    full = token_divergence(logits, teacher, reverse)
    assert (coarse <= full + 1e-5).all() and (coarse >= 0).all()
    if k >= 10:  # ten tokens and a bucket with the eleventh
        assert torch.allclose(coarse, full, rtol=1e-4, atol=1e-6)
    else:
        assert (coarse < full - 1e-3).any()
    coarse.sum().backward()
    gradient, logits.grad = logits.grad, None
    ids = teacher.topk(min(k, 11)).indices
    p, q = teacher.double().softmax(-1), logits.double().softmax(-1)
    P, Q = (torch.cat([t.gather(-1, ids), t.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1) for t in (p, q))
    P, Q = (P, Q) if k < 11 else (P[..., :-1], Q[..., :-1])
    plain = (1 - reverse) * (P * (P / Q).log()).sum(-1) + reverse * (Q * (Q / P).log()).sum(-1)
    plain.sum().backward()
    assert torch.allclose(coarse.double(), plain, rtol=1e-4, atol=1e-6)
    assert torch.allclose(gradient, logits.grad, rtol=1e-4, atol=1e-6)


def test_more_tokens_tell_more():
    logits, teacher = pair()
    means = [distillation_loss(logits, TopTokens.of(teacher, k)).item() for k in range(1, 12)]
    assert means == sorted(means) and means[0] < 0.9 * means[-1]


def test_a_teacher_that_is_almost_certain():
    """1 - (the kept tokens' probability) is 0 in float32 here; the loss and its gradient stay finite."""
    logits, teacher = pair()
    with torch.no_grad():
        logits[..., 0] += 60
        teacher[..., 0] += 60
    loss = distillation_loss(logits, TopTokens.of(teacher, 1), reverse=0.5)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert TopTokens.of(teacher, 1).log_p[..., 1].max() < -40


# In a Trainer


def data(count=12, length=16):
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(count, length)]


def trainer(model, folder, loss, dataset=None, **options):
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        **options,
    }
    dataset = data() if dataset is None else dataset
    arguments = TrainingArguments(str(folder), **options)
    return Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, compute_loss_func=loss)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def batch_loss(model, rows, **options):
    """The loss of some rows as one batch, by the functions alone, in eval mode."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    model.eval()
    with torch.no_grad():
        return distillation_loss(
            model(ids).logits, teacher_logits(model, {"input_ids": ids}), labels, **options
        ).item()


@pytest.fixture
def teacher_rows(monkeypatch):
    """A list to which the rows of every pass of the teacher that a cache runs are added."""
    rows = []

    def counting(model, batch):
        rows.append(len(batch["input_ids"]))
        return teacher_logits(model, batch)

    monkeypatch.setattr(peft_dlqat.train.teacher_cache, "teacher_logits", counting)
    return rows


@pytest.mark.parametrize("injected", [False, True])
def test_training_brings_the_model_to_its_teacher(tmp_path, injected):
    if injected:
        torch.manual_seed(0)
        model = tiny_model()
        model.add_adapter(DLQATConfig(bits=2, group_size=32, init="minmax"))
    else:
        model = adapted()
    before = batch_loss(model, data())
    run = trainer(model, tmp_path, DistillationLoss(model), max_steps=30)
    assert run.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-4)
    run.train()
    after = batch_loss(model, data())
    assert after < 0.7 * before
    assert run.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-4)
    assert losses(run)[0] == pytest.approx(before, rel=0.3)


def test_accumulated_batches_equal_one_big_batch(tmp_path):
    """Rows with different numbers of labels: a mean of the batches' means would differ."""
    rows = data()
    for i, row in enumerate(rows):
        row["labels"] = [-100] * (1 + i) + row["labels"][1 + i :]
    results = []
    for batch, steps in ((12, 1), (4, 3), (1, 12)):
        model = adapted()
        loss = DistillationLoss(model, reverse=0.3, task_weight=0.5)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 2}
        run = trainer(model, tmp_path, loss, rows, optim="sgd", **options)
        run.train()
        results.append((losses(run), trained(model)))
    start = {name: p for name, p in adapted().named_parameters() if p.requires_grad}
    for values, parameters in results[1:]:
        assert values == pytest.approx(results[0][0], rel=1e-4)
        for name, parameter in parameters.items():
            assert torch.allclose(parameter, results[0][1][name], atol=1e-6), name
    moved = max((p - start[name]).abs().max().item() for name, p in results[0][1].items())
    assert moved > 2e-5


def test_task_weight_adds_the_models_own_loss():
    model = adapted()
    batch = lm_batches(1)[0]
    batch["labels"][:, :5] = -100
    own = model(**batch).loss
    labels = batch.pop("labels")
    plain, mixed = (DistillationLoss(model, task_weight=weight) for weight in (0, 0.7))
    outputs = model(**batch)
    assert mixed(outputs, labels).item() == pytest.approx((plain(outputs, labels) + 0.7 * own).item(), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    curves = []
    for checkpointing in (False, True):
        model = adapted()
        run = trainer(model, tmp_path, DistillationLoss(model), max_steps=3, gradient_checkpointing=checkpointing)
        run.train()
        curves.append(losses(run))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_a_wrapped_model(tmp_path):
    """As under torchrun: the wrapper's call reaches the hook, and the teacher's pass goes past it."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = adapted()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        loss = DistillationLoss(wrapped)
        batch = lm_batches(1)[0]
        labels = batch.pop("labels")
        value = loss(wrapped(**batch), labels)
        value.backward()
        assert value.item() == pytest.approx(
            distillation_loss(model(**batch).logits, teacher_logits(model, batch), labels).item()
        )
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()


def bert(kind=BertForSequenceClassification, **head):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **head
    )
    model = get_peft_model(kind(config), DLQATConfig(bits=2, group_size=32, target_modules=["query"]))
    perturb(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.* is not saved with the adapter")
def test_a_classifier():
    model = bert(num_labels=3)
    batch, labels = {"input_ids": tokens(), "attention_mask": torch.ones(4, 16).long()}, torch.tensor([0, 1, 2, 1])
    loss = DistillationLoss(model, task_weight=1.0)
    outputs = model(**batch)
    expected = distillation_loss(outputs.logits, teacher_logits(model, batch)) + F.cross_entropy(
        outputs.logits, labels
    )
    assert loss(outputs, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    model(**batch)
    assert loss(outputs, labels, num_items_in_batch=8).item() == pytest.approx(expected.item() / 2, rel=1e-5)
    loss.remove()
    with_cache = DistillationLoss(model, cache=TeacherCache())
    outputs = model(**batch)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification are \[4, 3\]; distil without a cache"):
        with_cache(outputs, labels)


@pytest.mark.filterwarnings("ignore:.* is not saved with the adapter")
@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
def test_labels_of_a_position_itself(kind):
    """Unlike those of a causal language model, which are the next position's."""
    model = bert(kind, num_labels=3)
    labels = torch.full((4, 16), -100)
    labels[:, 5] = 2
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(4, 16).long()}
    for cache in (None, TeacherCache()):
        loss = DistillationLoss(model, task_weight=1.0, cache=cache)
        outputs = model(**batch)
        outputs.logits.retain_grad()
        value = loss(outputs, labels)
        value.backward()
        loss.remove()
        assert outputs.logits.grad.abs().sum(dim=(0, 2)).nonzero().tolist() == [[5]]
        divergence = distillation_loss(outputs.logits[:, 5], teacher_logits(model, batch)[:, 5])
        own = model(**batch, labels=labels).loss
        assert value.item() == pytest.approx((divergence + own).item(), rel=1e-5)
    for objective in ("distill", "task"):
        found = calibration_loss(model, {**batch, "labels": labels}, objective)
        assert found.item() == pytest.approx((divergence if objective == "distill" else own).item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.* is not saved with the adapter")
@pytest.mark.parametrize("head", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}], ids=str)
def test_a_head_without_a_distribution_is_refused(head):
    with pytest.raises(ValueError, match=r"no distribution over classes.*without compute_loss_func"):
        DistillationLoss(bert(**head))


def test_remove_takes_the_hook_away():
    model = adapted()
    loss = DistillationLoss(model)
    assert len(model._forward_pre_hooks) == 1
    loss.remove()
    assert not model._forward_pre_hooks
    batch = lm_batches(1)[0]
    with pytest.raises(ValueError, match="was not called before the loss"):
        loss(model(**batch), batch["labels"])


def test_models_that_it_cannot_take():
    for options, message in (({"reverse": 2}, "reverse=2"), ({"task_weight": -1}, "task_weight=-1 must be")):
        with pytest.raises(ValueError, match=message):
            DistillationLoss(adapted(), **options)
    with pytest.raises(ValueError, match="no DL-QAT adapter"):
        DistillationLoss(tiny_model())
    with pytest.raises(ValueError, match="no DL-QAT adapter"):
        DistillationLoss(get_peft_model(tiny_model(), LoraConfig()))
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        DistillationLoss(model)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    )
    with pytest.raises(ValueError, match="an encoder-decoder cannot be distilled"):
        DistillationLoss(get_peft_model(t5, DLQATConfig(bits=4, group_size=32, target_modules=["q"])))


def test_batches_that_it_cannot_take():
    model = adapted()
    loss, batch = DistillationLoss(model), lm_batches(1)[0]
    outputs = model(**batch)
    with pytest.raises(ValueError, match="no labels"):
        loss(outputs, None)
    with pytest.raises(ValueError, match="without logits"):
        loss({"loss": outputs.loss}, batch["labels"])
    with pytest.raises(ValueError, match="was not called before the loss"):
        loss(outputs, batch["labels"])
    model(**{key: value[:2] for key, value in batch.items()})
    with pytest.raises(ValueError, match="start one process for each"):
        loss(outputs, batch["labels"])


def test_sft_trainer(tmp_path):
    """TRL's runs a second forward pass for its metrics; the loss is that of the first."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    lengths = random.Random(0)
    text = [" ".join(random.Random(i).choices(names[4:], k=lengths.randint(4, 12))) for i in range(8)]
    curves = []
    for cache in (None, TeacherCache(), TeacherCache(k=VOCAB)):
        model = adapted()
        config = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
            eval_strategy="steps",
            eval_steps=4,
        )
        run = trl.SFTTrainer(
            model, config, train_dataset=(rows := Dataset.from_dict({"text": text})), eval_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip
        run.compute_loss_func = DistillationLoss(run.model, cache=cache)  # as an argument, TRL warns of it
        before = run.evaluate()["eval_loss"]
        run.train()
        after = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry][-1]
        assert after < before
        assert all("entropy" in entry for entry in run.state.log_history if "loss" in entry)
        curves.append([*losses(run), before, after])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-2)


# The cache


def test_training_with_a_cache_is_training_without(tmp_path, teacher_rows):
    curves = []
    for cache in (None, TeacherCache(), TeacherCache(folder=tmp_path / "cache")):
        model = adapted()
        run = trainer(model, tmp_path, DistillationLoss(model, cache=cache))
        run.train()
        curves.append(losses(run))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4) and curves[2] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert sum(teacher_rows) == 2 * 12  # 6 steps are two epochs of 12 rows: each row once, for either cache


def test_a_later_run_finds_the_folder_of_an_earlier_one(tmp_path, teacher_rows):
    for k in (4, None):
        teacher_rows.clear()
        for _ in range(2):
            model = adapted()
            cache = TeacherCache(k=k, folder=tmp_path / str(k))
            trainer(model, tmp_path, DistillationLoss(model, cache=cache), max_steps=3).train()
        assert sum(teacher_rows) == 12


def test_a_run_on_packed_weights_is_resumed_with_its_cache(tmp_path):
    """The folder is claimed before the weights are packed, and the base model's own weights are gone."""
    curves = []
    for resume in (False, True):
        model = adapted(storage="int8")
        cache = TeacherCache(k=4, folder=tmp_path / "cache")
        if not resume:
            for batch in data():
                cache.teacher(model, {"input_ids": torch.tensor([batch["input_ids"]])})
        options = {"save_strategy": "steps", "save_steps": 3}
        run = trainer(model, tmp_path, DistillationLoss(model, cache=cache), **options)
        run.add_callback(DLQATCallback())
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        curves.append(losses(run))
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)


def test_a_cache_of_few_tokens_trains_too(tmp_path):
    model = adapted()
    before = batch_loss(model, data())
    trainer(model, tmp_path, DistillationLoss(model, cache=TeacherCache(k=8)), max_steps=30).train()
    assert batch_loss(model, data()) < 0.7 * before


@pytest.mark.parametrize("reverse", [0.0, "confidence"])
def test_the_loss_against_kept_tokens(reverse):
    model = adapted()
    batch = lm_batches(1)[0]
    labels = batch.pop("labels")
    with torch.no_grad():
        logits, full = model(**batch).logits, teacher_logits(model, batch)
    expected = distillation_loss(logits, full, labels, reverse=reverse).item()
    values = [
        distillation_loss(logits, TeacherCache(k=k).teacher(model, batch), labels, reverse=reverse).item()
        for k in (8, VOCAB, 2 * VOCAB)
    ]
    assert values[1] == pytest.approx(expected, rel=2e-3) and values[2] == values[1]
    assert 0.1 * expected < values[0] < 0.9 * expected


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("k", [None, 5])
def test_padding_on_either_side_gives_the_same(kind, k, teacher_rows):
    """The predictions of a sequence are those that it has alone, in a batch of its own."""
    model, ids = adapted(kind), tokens(3, 10)
    lengths = (10, 4, 7)
    cache = TeacherCache(k=k)
    for side in ("right", "left"):
        batch = {"input_ids": torch.zeros(3, 12).long(), "attention_mask": torch.zeros(3, 12).long()}
        starts = [0 if side == "right" else 12 - length for length in lengths]
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            batch["input_ids"][row, start : start + length] = ids[row, :length]
            batch["attention_mask"][row, start : start + length] = 1
        found = cache.teacher(model, batch)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            alone = teacher_logits(model, {"input_ids": ids[row : row + 1, :length]})[0]
            here = slice(start, start + length)
            if k is None:
                assert torch.allclose(found[row, here], alone, atol=1e-5)
            else:
                assert torch.equal(found.ids[row, here], alone.topk(k).indices)
                expected = TopTokens.of(alone, k).log_p
                assert torch.allclose(found.log_p[row, here].float(), expected, rtol=1e-3, atol=1e-4)
    assert teacher_rows == [3]


def test_packed_rows_are_known_by_their_sequences(teacher_rows):
    model, ids, cache = adapted(), tokens(3, 8), TeacherCache()
    expected = teacher_logits(model, {"input_ids": ids})
    packed = {"input_ids": ids.view(1, 24), "position_ids": torch.arange(8).repeat(3)[None]}
    assert torch.allclose(cache.teacher(model, packed)[0], expected.view(24, -1), atol=1e-5)
    order = torch.tensor([2, 0, 0])
    assert torch.allclose(cache.teacher(model, {"input_ids": ids[order]}), expected[order], atol=1e-5)
    assert teacher_rows == [3]


def test_packed_sequences_of_many_lengths_are_not_padded_to_the_longest(monkeypatch):
    model, ran = adapted(), []

    def counting(model, batch):
        ran.append(batch["input_ids"].numel())
        return teacher_logits(model, batch)

    monkeypatch.setattr(peft_dlqat.train.teacher_cache, "teacher_logits", counting)
    ids = tokens(1, 60)
    lengths = [30, *[3] * 10]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = TeacherCache().teacher(model, {"input_ids": ids, "position_ids": positions})
    assert sum(ran) <= 2 * 60 and max(ran) <= 60
    start = 0
    for length in lengths:
        alone = teacher_logits(model, {"input_ids": ids[:, start : start + length]})[0]
        torch.testing.assert_close(found[0, start : start + length], alone, atol=1e-5, rtol=1e-4)
        start += length


def test_the_same_sequence_twice_in_a_batch_runs_once(teacher_rows):
    model, ids = adapted(), tokens(2)
    found = TeacherCache().teacher(model, {"input_ids": ids[[0, 1, 0]]})
    assert teacher_rows == [2] and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_small_and_keep_the_dtype(dtype, tmp_path):
    model = get_peft_model(tiny_model(dtype=dtype), DLQATConfig(bits=3, group_size=32, init="minmax"))
    batch = {"input_ids": tokens(1)}
    assert TeacherCache().teacher(model, batch).dtype == dtype
    TeacherCache(k=4, folder=tmp_path).teacher(model, batch)
    (file,) = tmp_path.rglob("*.safetensors")
    entry = load_file(file)
    assert (entry["log_p"].dtype, entry["ids"].dtype) == (torch.float16, torch.int32)
    assert list(entry["log_p"].shape) == [16, 5] and list(entry["ids"].shape) == [16, 4]


def damage_cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def damage_empty(file):
    file.write_bytes(b"")


def damage_foreign(file):
    save_file({"weight": torch.zeros(2)}, file)


def damage_other_length(file):
    save_file({name: tensor[:-1].contiguous() for name, tensor in load_file(file).items()}, file)


def changed(file, name, change):
    """A whole file, of another content, with the checksum that it had."""
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    tensors = load_file(file)
    name = name if name in tensors else "logits"
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file, metadata=metadata)


def damage_nan(file):
    changed(file, "log_p", lambda values: values.fill_(torch.nan))


def damage_ids(file):
    changed(file, "ids", lambda values: values.fill_(VOCAB + 1))


def damage_fewer(file):
    changed(file, "log_p", lambda values: values[:, 1:])
    changed(file, "ids", lambda values: values[:, 1:])


def damage_another_sequence(file):
    file.write_bytes(sorted(file.parents[1].rglob("*.safetensors"))[-1].read_bytes())


def damage_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = [
    damage_cut, damage_empty, damage_foreign, damage_other_length, damage_nan, damage_ids, damage_fewer,
    damage_another_sequence, damage_a_bit,
]  # fmt: skip


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_file_is_made_anew(tmp_path, teacher_rows, damage, k):
    model, batch = adapted(), {"input_ids": tokens(3)}
    intact = TeacherCache(k=k, folder=tmp_path).teacher(model, batch)
    file = sorted(tmp_path.rglob("*.safetensors"))[0]
    damage(file)
    for _ in range(2):
        again = TeacherCache(k=k, folder=tmp_path).teacher(model, batch)
        one, other = (intact, again) if k is None else (intact.log_p, again.log_p)
        assert torch.allclose(one, other, atol=1e-2 if k else 1e-5)
    assert teacher_rows == [3, 1]


WRITER = """
import sys, torch
from conftest import tiny_model
from peft import get_peft_model
from peft_dlqat import DLQATConfig
from peft_dlqat.train.teacher_cache import TeacherCache
torch.manual_seed(0)
model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, init="minmax"))
cache = TeacherCache(folder=sys.argv[1])
for seed in range(10**6):
    cache.teacher(model, {"input_ids": torch.randint(64, (8, 48), generator=torch.Generator().manual_seed(seed))})
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_files(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob("*.safetensors"))) < 40:
            assert writer.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        writer.kill()
        writer.wait()
    files = [file for file in tmp_path.rglob("*.safetensors") if not file.name.startswith(".")]
    assert len(files) >= 40
    assert all(load_file(file)["logits"].shape == (48, VOCAB) for file in files)
    ids = torch.randint(64, (8, 48), generator=torch.Generator().manual_seed(0))
    found = TeacherCache(folder=tmp_path).teacher(adapted(), {"input_ids": ids})
    assert torch.allclose(found, teacher_logits(adapted(), {"input_ids": ids}), atol=1e-5)


def test_an_entry_appears_when_it_is_whole(tmp_path, monkeypatch):
    """A writer that stops after half a file."""

    def half(entry, path, _):
        save_file(entry, path)
        path.write_bytes(path.read_bytes()[:500])
        assert not list(tmp_path.rglob("[!.]*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(peft_dlqat.train.teacher_store, "save_tensors", half)
    model, batch = adapted(), {"input_ids": tokens(2)}
    with pytest.raises(KeyboardInterrupt):
        TeacherCache(folder=tmp_path).teacher(model, batch)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["teacher.json"]
    monkeypatch.undo()
    assert torch.allclose(TeacherCache(folder=tmp_path).teacher(model, batch), teacher_logits(model, batch), atol=1e-5)


def test_a_folder_belongs_to_one_base_model(tmp_path):
    batch = {"input_ids": tokens(1)}
    TeacherCache(k=4, folder=tmp_path).teacher(adapted(), batch)
    other = tiny_model()
    other.model.layers[1].mlp.up_proj.weight.data *= 1.001
    other = get_peft_model(other, DLQATConfig(bits=3, group_size=32, init="minmax"))
    half = get_peft_model(tiny_model(dtype=torch.bfloat16), DLQATConfig(bits=3, group_size=32, init="minmax"))
    for model in (other, half, adapted("gpt2")):
        with pytest.raises(ValueError, match="the predictions of another base model"):
            TeacherCache(k=4, folder=tmp_path).teacher(model, batch)
    with pytest.raises(ValueError, match="filled with k=4, not k=5"):
        TeacherCache(k=5, folder=tmp_path).teacher(adapted(), batch)
    header = tmp_path / "teacher.json"
    for text in (header.read_text()[:-9], "[]", json.dumps({"k": 4})):
        header.write_text(text)
        with pytest.raises(ValueError, match="cannot be read"):
            TeacherCache(k=4, folder=tmp_path).teacher(adapted(), batch)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_writers_of_one_folder_the_first_has_it(tmp_path, monkeypatch, links):
    """Both have found it empty. On a file system without links the last one has it."""
    empty = [True, True]
    monkeypatch.setattr(Path, "exists", lambda self: not (empty and empty.pop()))
    if not links:
        monkeypatch.setattr(os, "link", refuse_link)
    first, second = EntryFolder(tmp_path), EntryFolder(tmp_path)
    first.claim(4, "one")
    if links:
        with pytest.raises(ValueError, match="the predictions of another base model"):
            second.claim(4, "other")
        first.claim(4, "one")
    else:
        second.claim(4, "other")
        with pytest.raises(ValueError, match="the predictions of another base model"):
            EntryFolder(tmp_path).claim(4, "one")


def refuse_link(*paths):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_that_predicts_no_number_is_refused_and_not_kept(tmp_path, k, value):
    model, batch = adapted(), {"input_ids": tokens(2)}
    model.get_base_model().lm_head.register_forward_hook(lambda *args: torch.full_like(args[2], value))
    cache = TeacherCache(k=k, folder=tmp_path)
    with pytest.raises(FloatingPointError, match="predicts NaN or infinity for a sequence of 16 tokens"):
        cache.teacher(model, batch)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_cache_takes_wrapped_and_offloaded_models():
    model, batch = adapted(), {"input_ids": tokens(2)}
    cache = TeacherCache()
    cache.teacher(torch.nn.DataParallel(model), batch)
    DistillationLoss(torch.nn.DataParallel(model), cache=cache)
    offloaded = cpu_offload(adapted())
    assert base_fingerprint(offloaded) == base_fingerprint(model)
    assert torch.equal(TeacherCache().teacher(offloaded, batch), cache.teacher(model, batch))


def test_the_fingerprint_tells_configs_and_takes_weights_of_any_size():
    plain = base_fingerprint(tiny_model())
    stretched = tiny_model()
    stretched.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    beside = tiny_model()
    beside.config.use_cache, beside.config.pad_token_id, beside.config.attention_dropout = False, 5, 0.1
    assert base_fingerprint(stretched) != plain == base_fingerprint(beside)
    for kind, field in (("llama", "num_attention_heads"), ("gpt2", "n_head")):
        model = tiny_model(kind)
        setattr(model.config, field, 2 * getattr(model.config, field))
        assert base_fingerprint(model) != base_fingerprint(tiny_model(kind))
    large = torch.nn.Embedding(2**22 + 1, 4)  # more values than float32 can count
    fingerprint = base_fingerprint(large)
    large.weight.data[-1, -1] += 1
    assert base_fingerprint(large) != fingerprint


def test_a_cache_in_memory_belongs_to_one_base_model():
    cache, batch = TeacherCache(), {"input_ids": tokens(1)}
    cache.teacher(adapted(), batch)
    cache.teacher(adapted(bits=3), batch)  # another student of the same teacher
    with pytest.raises(ValueError, match="another base model"):
        cache.teacher(adapted("opt"), batch)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2 stores its weights transposed
def test_the_fingerprint_is_the_base_models(kind):
    plain = base_fingerprint(tiny_model(kind))
    model = adapted(kind)
    perturb(model)
    assert base_fingerprint(model) == plain
    model.merge_adapter()
    assert base_fingerprint(model) == plain
    injected = tiny_model(kind)
    injected.add_adapter(DLQATConfig(bits=2, group_size=32, target_modules="all-linear"))
    assert base_fingerprint(injected) == plain
    if kind == "llama":  # gpt2's is tied to the embedding, and PEFT warns
        assert base_fingerprint(adapted(kind, modules_to_save=["lm_head"])) == plain
    lora = get_peft_model(tiny_model(kind), LoraConfig(target_modules="all-linear", fan_in_fan_out=kind == "gpt2"))
    assert base_fingerprint(lora) == plain != base_fingerprint(tiny_model(kind, torch.bfloat16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixel_values": torch.zeros(2, 3)}, r"the batch has \['pixel_values'\]"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "row 0 of the attention_mask has a hole"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask of the input_ids' shape"),
        ({"attention_mask": torch.zeros(2, 4)}, "no row of the batch attends"),
        ({"position_ids": torch.tensor([[5, 6, 7, 8]])}, "row 0 of the position_ids does not count from 0"),
        ({"position_ids": torch.tensor([[0, 1, 1, 2]])}, "row 0 of the position_ids does not count from 0"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 4, 64)}, "knows a sequence by its input_ids alone"),
    ],
)
def test_batches_that_a_cache_cannot_take(change, message):
    with pytest.raises(ValueError, match=message):
        TeacherCache().teacher(adapted(), {"input_ids": tokens(2, 4), **change})


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_an_impossible_k(k):
    with pytest.raises(ValueError, match=r"k=.* must be a positive integer"):
        TeacherCache(k=k)


@pytest.mark.parametrize("max_bytes", [0, -1, 2.0, True])
def test_an_impossible_limit(max_bytes):
    with pytest.raises(ValueError, match=r"max_bytes=.* must be a positive integer"):
        TeacherCache(max_bytes=max_bytes)


def test_a_full_cache_warns_once_and_trains_as_before(tmp_path, teacher_rows):
    """Room for 5 of 12 sequences of 16 tokens: the other 7 are run in both epochs."""
    plain = adapted()
    expected = trainer(plain, tmp_path, DistillationLoss(plain))
    expected.train()
    model, cache = adapted(), TeacherCache(max_bytes=5 * 16 * VOCAB * 4 + 100)
    run = trainer(model, tmp_path, DistillationLoss(model, cache=cache))
    with pytest.warns(UserWarning, match=r"cache is full: 5 sequences .*k=64.*folder=") as caught:
        run.train()
    assert sum("cache is full" in str(w.message) for w in caught) == 1
    assert sum(teacher_rows) == 12 + 7
    assert losses(run) == pytest.approx(losses(expected), rel=1e-4)


# A base model whose biases train


@pytest.mark.parametrize("bias", ["all", "dlqat_only"])
def test_a_teacher_that_would_drift_is_refused_but_for_a_cache_that_was_filled_before(tmp_path, bias):
    model = adapted("gpt2", bias=bias)
    with pytest.raises(
        ValueError, match=r"parameters of the base model train in place .*bias='none'.*cache="
    ) as error:
        DistillationLoss(model)
    assert "attn.c_attn" in str(error.value)
    cache, rows = TeacherCache(), data()
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    before = cache.teacher(model, batch)
    run = trainer(model, tmp_path, DistillationLoss(model, cache=cache), rows, learning_rate=2e-3, max_steps=12)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert torch.equal(cache.teacher(model, batch), before)
    assert not torch.allclose(teacher_logits(model, batch), before, atol=1e-2), "the biases have not moved"
    with pytest.raises(ValueError, match="have been trained since the cache was made"):
        cache.teacher(model, {"input_ids": tokens(1, 9)})


def test_modules_to_save_are_copies_and_leave_the_teacher_alone(tmp_path):
    model, batch = adapted(modules_to_save=["lm_head"]), {"input_ids": tokens()}
    before = teacher_logits(model, batch)
    trainer(model, tmp_path, DistillationLoss(model)).train()
    assert not torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight,
                           model.base_model.model.lm_head.original_module.weight)  # fmt: skip
    assert torch.equal(teacher_logits(model, batch), before)


# Merged adapters, and what the teacher's pass leaves alone


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2 stores its weights transposed
def test_the_teacher_of_a_merged_model_leaves_it_merged(kind):
    model, batch = adapted(kind), {"input_ids": tokens()}
    perturb(model)
    expected, own = teacher_logits(model, batch), model(**batch).logits
    model.merge_adapter()
    tensors = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    assert torch.equal(teacher_logits(model, batch), expected) and not torch.equal(expected, own)
    for name, parameter in model.named_parameters():
        pointer, value = tensors[name]
        assert parameter.data_ptr() == pointer and torch.equal(parameter, value), name
    assert all(layer.merged_adapters == ["default"] for layer in adapter_layers(model)[1].values())
    assert torch.equal(model(**batch).logits, own)
    model.unmerge_adapter()
    assert torch.equal(teacher_logits(model, batch), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_passes_outside_a_trainer_keep_no_keys_and_values(kind, monkeypatch):
    model, batch = adapted(kind), lm_batches(1)[0]
    assert model.config.use_cache
    seen = []
    model.get_base_model().register_forward_hook(lambda *args: seen.append(args[-1].past_key_values))
    teacher_logits(model, batch)
    calibrate(model, [batch], steps=1, progress=False)
    calibrate(model, [batch], steps=1, objective="task", progress=False)
    evaluate_model(model, [batch])
    assert len(seen) > 8 and all(cache is None for cache in seen)


def test_the_device_is_that_of_the_first_parameter_that_is_not_offloaded():
    model = tiny_model()
    model.model.embed_tokens.to("meta")
    assert next(model.parameters()).is_meta and device_of(model) == torch.device("cpu")
    assert device_of(torch.nn.Identity()) == torch.device("cpu")
