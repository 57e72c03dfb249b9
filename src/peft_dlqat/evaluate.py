"""How good a model is: on held-out text beside full precision, and on tasks of the lm-evaluation-harness."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .console import progress_bar
from .placement import device_of
from .running import (
    dlqat_layers,
    evaluating,
    forward,
    is_encoder_decoder,
    random_state_kept,
    teacher_logits,
    temporarily_merged,
)
from .train.divergence import by_chunks, cross_entropy, token_divergence


@dataclass(frozen=True)
class Evaluation:
    """What [`evaluate_model`] measured, on average over the tokens.

    Attributes:
        kl: KL(teacher || model) of the next-token distributions, in nats a token; None without a teacher.
        loss: cross-entropy of the next token, in nats a token.
        perplexity: exp(loss).
        agreement: share of the positions where model and teacher hold the same token for the likeliest, from 0 to 1;
            None without a teacher.
        tokens: how many tokens were predicted.
    """

    kl: float | None
    loss: float
    perplexity: float
    agreement: float | None
    tokens: int

    def __str__(self) -> str:
        """One line, for people."""
        to_teacher = (
            ""
            if self.kl is None or self.agreement is None
            else f"KL {self.kl:.4g} nats, agreement {self.agreement:.1%}, "
        )
        return f"{to_teacher}loss {self.loss:.4f} nats, perplexity {self.perplexity:.4g} ({self.tokens:,} tokens)"


@torch.no_grad()
def evaluate_model(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], teacher: nn.Module | None = None
) -> Evaluation:
    """Measure a causal language model on held-out text: its loss, and how far it is from full precision.

    Adapters are merged while measuring; afterwards weights, adapters and modes (train or eval) are as they were.

    Every token counts that the batch's `labels` name as a next token (not -100). Without labels it is every token that
    `attention_mask` keeps, after another that it keeps; in packed rows that includes the first token of a sequence
    after the last of another, so give labels there.

    Args:
        model: a causal language model with DL-QAT adapters, merged or not, or any other.
        batches: dicts of the model's keyword arguments, with `labels` or `input_ids` [batch, length]; read once.
        teacher: a model of the same vocabulary to compare with. By default the same model with its adapters switched
            off, which needs no second copy, but is no longer the model in full precision where biases were trained; a
            model without adapters (after `merge_and_unload`, say) is compared with nothing.

    Returns:
        Means over all tokens of all batches.

    Raises:
        ValueError: if there are no batches or no tokens in them, a batch is no dict or names no next tokens, the model
            is no causal language model, the vocabularies differ, or the teacher contains the model's adapters.
    """
    layers = dlqat_layers(model)
    _check_teacher(layers, teacher)
    own_teacher = teacher is None and bool(layers)
    tokens, loss, kl, agreements = 0, 0.0, 0.0, 0.0  # sums over the tokens
    with ExitStack() as stack:
        for each in (model,) if teacher is None else (model, teacher):
            stack.enter_context(evaluating(each))
            stack.enter_context(temporarily_merged(each))
        for batch in progress_bar(_batches(batches, device_of(model)), desc="evaluating"):
            inputs, labels = _inputs_and_labels(batch)
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            counts = targets != -100  # as in `distillation_loss`
            logits = _logits(model, inputs, labels)
            tokens += int(counts.sum())
            loss += float(cross_entropy(logits, targets)[counts].sum())
            if own_teacher:
                of_teacher = teacher_logits(model, inputs)
            elif teacher is not None:
                of_teacher = _logits(teacher, send_to_device(inputs, device_of(teacher)), labels).to(logits.device)
            else:
                continue
            _check_vocabularies(logits, of_teacher)
            kl += float(token_divergence(logits, of_teacher)[counts].sum())
            agreements += float(by_chunks(_same_top, logits, of_teacher)[counts].sum())
    if not tokens:
        raise ValueError("no batch has a token to predict; check labels (-100 does not count) and attention_mask.")
    compared = own_teacher or teacher is not None
    return Evaluation(
        kl=kl / tokens if compared else None,
        loss=loss / tokens,
        perplexity=torch.tensor(loss / tokens, dtype=torch.float64).exp().item(),  # inf, where math.exp would raise
        agreement=agreements / tokens if compared else None,
        tokens=tokens,
    )


def _check_teacher(layers: list[Any], teacher: nn.Module | None) -> None:
    """Refuse a teacher that get_peft_model has changed in place: it would be the student itself, at a KL of 0."""
    if teacher is not None and layers and set(map(id, layers)) & set(map(id, dlqat_layers(teacher))):
        raise ValueError(
            "the teacher contains the model's own adapters: get_peft_model puts them into the base model that it is "
            "given. Leave teacher out, which compares with the model without its adapters, or load another copy."
        )


def _batches(batches: Iterable[Mapping[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches on the model's device."""
    empty = True
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"a batch is a {type(batch).__name__}, but must be a dict of the model's arguments, such as "
                "{'input_ids': ..., 'labels': ...}; batches is an iterable of such dicts."
            )
        empty = False
        yield send_to_device(dict(batch), device)
    if empty:
        raise ValueError("there are no batches; give at least one (an iterator can be read only once).")


def _inputs_and_labels(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """The batch without its labels, and labels [batch, length]: its own, or its input ids where nothing masks them."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if labels is None and isinstance(ids, torch.Tensor):
        labels = ids
        if batch.get("attention_mask") is not None:
            kept = batch["attention_mask"].bool()
            after_another = F.pad(kept[:, :-1], (1, 0), value=True)  # else a guess from padding alone
            labels = ids.masked_fill(~(kept & after_another), -100)
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        raise ValueError(
            f"a batch with {sorted(batch)} does not say which tokens come next; it needs labels or input_ids, tensors "
            "[batch, length]."
        )
    return inputs, labels


def _logits(model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """[batch, length, vocabulary]."""
    logits = None if is_encoder_decoder(model) else getattr(forward(model, inputs), "logits", None)
    if logits is None or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{type(model).__name__} is no causal language model, with one distribution for each of the labels "
            f"{list(labels.shape)}; only such can be evaluated here."
        )
    return logits


def _same_top(logits: torch.Tensor, of_teacher: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1) == of_teacher.argmax(-1)


def _check_vocabularies(logits: torch.Tensor, of_teacher: torch.Tensor) -> None:
    if logits.shape[-1] != of_teacher.shape[-1]:
        raise ValueError(
            f"the model has a vocabulary of {logits.shape[-1]} tokens and the teacher one of {of_teacher.shape[-1]}; "
            "their distributions cannot be compared: take the model's own base model for the teacher."
        )


# Tasks of common-sense reasoning that are usual in papers on low-bit language models, without examples in the prompt.
TASK_SETS: dict[str, list[str]] = {
    "mmlu": ["mmlu"],  # the harness's own group of 57 subjects, with their mean
    "commonsense": ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
}


def evaluate_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 1,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a causal language model on tasks of the lm-evaluation-harness.

    Adapters are merged while measuring; afterwards weights, adapters, modes (train or eval), the tokenizer and random
    number generators are as they were. The tasks' data come from the Hub, unless a task says otherwise.

    Args:
        model: a causal language model, with adapters or without.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups of the harness, or of [`TASK_SETS`] ("mmlu", "commonsense"); one or several.
        include_path: a folder of further tasks, as YAML files. Where it has all of the tasks, the harness's own, of
            which there are thousands, are not looked through.
        limit: only so many questions of each task, or, below 1, such a share; for trying things out.
        batch_size: sequences in a forward pass, or "auto".
        num_fewshot: examples in the prompt; by default what each task says, mostly none.

    Returns:
        By task (and group), by metric, such as {"piqa": {"acc": 0.77, "acc_stderr": 0.01, ...}}; accuracies are from 0
        to 1. A metric under a filter keeps the filter's name: "exact_match,strict-match". In a run of
        several processes only the first has results; the others get {}.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if there are no tasks, or one is unknown.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f"evaluate_tasks needs the lm-evaluation-harness ({error}): pip install peft-dlqat[eval]"
        ) from error
    names = resolve_tasks(tasks)
    manager = task_manager(names, include_path)
    with evaluating(model), random_state_kept():
        # Made before merging, since it ties weights anew, and on a copy of the tokenizer, to which it may add padding.
        harness_model = HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, backend="causal"
        )
        with temporarily_merged(model):
            results = lm_eval.simple_evaluate(
                model=harness_model,
                tasks=names,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                log_samples=False,
            )
    return {} if results is None else _flat({**results["results"], **results.get("groups", {})})


def resolve_tasks(tasks: str | Sequence[str]) -> list[str]:
    """Names of tasks, each once, with those of [`TASK_SETS`] in the place of a set's name.

    Args:
        tasks: one name or several.

    Raises:
        ValueError: if there are none.
    """
    given = [tasks] if isinstance(tasks, str) else list(tasks)
    names = list(dict.fromkeys(name for each in given for name in TASK_SETS.get(each, [each])))
    if not names:
        raise ValueError(f"tasks={tasks!r} names no task; name tasks of the lm-evaluation-harness, or {[*TASK_SETS]}.")
    return names


def task_manager(names: list[str], include_path: str | os.PathLike[str] | None) -> Any:
    """The harness's index of tasks, with all of the names in it.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if one is unknown.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not os.path.isdir(include_path):
            raise ValueError(f"include_path={os.fspath(include_path)!r} is no folder; it holds tasks as YAML files.")
        own = TaskManager(include_path=os.fspath(include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        where = "" if include_path is None else f", nor is it in {os.fspath(include_path)!r}"
        raise ValueError(
            f"the lm-evaluation-harness has no task {', '.join(map(repr, unknown))}{where}; `lm-eval ls tasks` lists "
            f"them, and this package has the sets {[*TASK_SETS]}."
        )
    return manager


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Numbers alone, by task and metric; ",none" says that a metric has no filter."""
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and "," in name  # others are its name, its number of questions, ...
        }
        for task, metrics in results.items()
    }
