"""What a Trainer's batches give a calibration, and that training loses nothing by it."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from conftest import VOCAB, calibrated, say_calibrated, tiny_model, tokens
from datasets import IterableDataset as HubStream
from peft import get_peft_model
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from word_tokenizer import word_tokenizer

from peft_dlqat import DLQATCallback, DLQATConfig
from peft_dlqat.train.trainer_batches import model_arguments, order_kept, problem

ROWS = 24


class ReadOnce(IterableDataset):
    """A stream that ends for good when its rows have been given."""

    def __init__(self):
        self._rows = iter(tokens(ROWS, 12))

    def __iter__(self):
        for row in self._rows:
            yield {"input_ids": row, "labels": row}


class Wrapped(IterableDataset):
    """A stream of another one, as accelerate makes where there are several processes."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        yield from self.dataset


def restartable():
    def rows():
        for row in tokens(ROWS, 12).tolist():
            yield {"input_ids": row, "labels": row}

    return HubStream.from_generator(rows).with_format("torch")


def train(data, folder, callback, steps=ROWS // 4):
    """Returns the Trainer, how many rows were trained on, and what was said of calibration."""
    model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, r=4, task_type="CAUSAL_LM"))
    rows = []

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            rows.extend(kwargs["input_ids"].tolist())

    model.register_forward_pre_hook(count, with_kwargs=True)
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, max_steps=steps, **options)
    run = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    return run, rows, [str(found.message) for found in caught if "calibrat" in str(found.message)]


@pytest.mark.parametrize("wrap", [False, True])
def test_a_stream_that_is_read_once_is_left_to_training(tmp_path, wrap):
    run, rows, said = train(Wrapped(ReadOnce()) if wrap else ReadOnce(), tmp_path, DLQATCallback())
    assert rows == tokens(ROWS, 12).tolist() and run.state.global_step == ROWS // 4
    (message,) = said
    assert "is a stream" in message and "stay as fitted to the weights" in message
    assert "calibration_dataloader=" in message and not calibrated(run.model)


def test_such_a_stream_beside_a_loader_for_calibration(tmp_path):
    callback = DLQATCallback(calibration_dataloader=[{"input_ids": tokens(seed=7)}])
    run, rows, said = train(ReadOnce(), tmp_path, callback)
    assert rows == tokens(ROWS, 12).tolist() and said == []
    assert calibrated(run.model)


def test_a_stream_that_starts_again_is_calibrated_on(tmp_path):
    run, rows, said = train(restartable(), tmp_path, DLQATCallback())
    assert rows == tokens(ROWS, 12).tolist() and said == []
    assert calibrated(run.model)


def test_a_stream_that_lost_rows_is_an_error(tmp_path):
    """It looks like one of `datasets`, and is read once all the same."""
    rows = iter(tokens(ROWS, 12).tolist())
    stream = HubStream.from_generator(lambda: ({"input_ids": row, "labels": row} for row in rows))
    with pytest.raises(ValueError, match=r"read once, and rows of it are lost.*calibration_dataloader"):
        train(stream.with_format("torch"), tmp_path, DLQATCallback())
    rows = iter(tokens(ROWS, 12).tolist())
    stream = HubStream.from_generator(lambda: ({"input_ids": row, "labels": row} for row in rows))
    assert len(train(stream.with_format("torch"), tmp_path, DLQATCallback(calibration=False))[1]) == ROWS


def test_no_calibration_when_none_is_wanted(tmp_path):
    run, rows, said = train(ReadOnce(), tmp_path, DLQATCallback(calibration=False))
    assert len(rows) == ROWS and said == []
    assert not calibrated(run.model)


def test_samplers_draw_the_same_afterwards():
    """TRL's GRPO shuffles by a generator of its own; a resumed run would skip other batches than were trained on."""
    generator = torch.Generator().manual_seed(0)
    data = list(range(40))
    loader = DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=generator))
    states = generator.get_state(), torch.get_rng_state()
    with order_kept(loader):
        drawn = [batch.tolist() for batch in itertools.islice(loader, 3)]
    assert torch.equal(generator.get_state(), states[0]) and torch.equal(torch.get_rng_state(), states[1])
    assert [batch.tolist() for batch in loader][:3] == drawn
    assert not torch.equal(generator.get_state(), states[0])


@pytest.mark.parametrize(
    "batch, kept",
    [
        ({"input_ids": 1, "attention_mask": 2, "labels": 3}, {"input_ids": 1, "attention_mask": 2, "labels": 3}),
        ({"input_ids": 1, "completion_mask": 2, "margin": 3}, {"input_ids": 1}),
        (
            {"chosen_input_ids": 1, "chosen_labels": 2, "rejected_input_ids": 3, "prompt": ["text"], "chosen": ["x"]},
            {"input_ids": 1, "labels": 2},
        ),
        ({"inputs_embeds": 1, "position_ids": 2}, {"inputs_embeds": 1, "position_ids": 2}),
        ({"prompt": ["text"]}, None),
        ({"attention_mask": 1}, None),
        ([{"prompt": "text"}], None),
    ],
)
def test_arguments_of_the_model(batch, kept):
    model = get_peft_model(tiny_model(), DLQATConfig(bits=3, group_size=32, task_type="CAUSAL_LM"))
    assert model_arguments(model, batch) == kept
    says = problem(model, [batch])
    assert (says == "") == (kept is not None)
    assert kept is not None or says.startswith(("a training batch is a list", "a training batch is a dict of ['"))


def test_arguments_of_a_plain_net():
    class Net(torch.nn.Module):
        def forward(self, pixels, scale=1.0):
            return pixels

    assert model_arguments(Net(), {"pixels": 1, "weight": 2}) == {"pixels": 1}
    Net.forward = lambda self, **kwargs: kwargs
    assert model_arguments(Net(), {"pixels": 1, "weight": 2}) == {"pixels": 1, "weight": 2}


def test_problem_of_an_empty_loader_is_calibrations_own():
    assert problem(tiny_model(), []) == ""
    assert "is a stream" in problem(tiny_model(), iter([{"input_ids": 1}]))


def test_seq2seq_trainer(tmp_path):
    """T5 with labels, of which the collator makes the decoder's inputs too."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = get_peft_model(
        T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes)),
        DLQATConfig(bits=3, group_size=16, r=4, task_type="SEQ_2_SEQ_LM"),
    )
    rows = [{"input_ids": row, "labels": row[: 5 + i % 3]} for i, row in enumerate(tokens(16).tolist())]
    for collate in (None, "with decoder_input_ids"):
        options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
        options |= {"save_strategy": "no", "learning_rate": 2e-4}
        arguments = Seq2SeqTrainingArguments(str(tmp_path), per_device_train_batch_size=4, **options)
        collator = DataCollatorForSeq2Seq(word_tokenizer(), model if collate else None)
        run = Seq2SeqTrainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[DLQATCallback()])
        run.train()
        assert calibrated(run.model)
        say_calibrated(run.model, False)
