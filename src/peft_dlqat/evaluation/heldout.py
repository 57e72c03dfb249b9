"""How close a model is to the one in full precision, on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn

from ..distillation import evaluating, forward, teacher_logits
from ..distillation.divergence import by_chunks, cross_entropy, token_divergence
from ..distillation.running import is_encoder_decoder
from ..placement import device_of
from .merging import dlqat_layers, temporarily_merged


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
        for batch in _batches(batches, device_of(model)):
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
