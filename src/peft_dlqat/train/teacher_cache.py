"""The teacher's predictions, kept so that its pass is paid once for each sequence."""

from __future__ import annotations

import hashlib
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..placement import in_any_process, is_sharded
from ..running import base_model, teacher_logits, trained_base_parameters, unwrapped
from .divergence import SMALLEST_KEPT, TopTokens
from .teacher_store import Entry, EntryFolder, EntryMemory, base_fingerprint

# What a batch may hold beside token ids: these say where sequences begin and end, and the cache finds that itself.
_KNOWN = {"input_ids", "attention_mask", "position_ids", "labels", "cu_seq_lens_q", "cu_seq_lens_k"}


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a batch: its tokens, int64 [length], and where they are."""

    tokens: torch.Tensor
    row: int
    start: int

    @property
    def key(self) -> str:
        return hashlib.blake2b(self.tokens.numpy().tobytes(), digest_size=20).hexdigest()


class TeacherCache:
    """Keeps what the base model predicts, by sequence of tokens, for [`DistillationLoss`] of a model of tokens.

    A sequence is what a row attends to, or one of several that are packed into a row. On a miss the teacher runs on
    the missing sequences alone, without their padding, so that left and right padding give the same. (To models that
    count positions through padding on the left where no `position_ids` are given, as GPT-2 does, they are not the
    same: pad on the right, or pass them.)

    With k, the k likeliest tokens of a position are kept, as float16 log-probabilities (rounding them moves a
    probability by a two-thousandth, less than bfloat16 logits are off by) and int32 ids: 6 bytes a token. The loss is
    then the divergence on these and one bucket for all others. Without, all logits are kept in the model's dtype, and
    the loss is as without a cache.

    Args:
        k: tokens kept at each position, or None for all.
        folder: keep them there, for later runs and for other processes; None keeps them in memory.
        max_bytes: of memory, beyond which no more is kept: a warning says so, and the teacher runs each time for the
            other sequences. A folder has no limit.

    Raises:
        ValueError: for another k or max_bytes.
    """

    def __init__(
        self, k: int | None = None, folder: str | os.PathLike[str] | None = None, max_bytes: int = 4 * 2**30
    ) -> None:
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise ValueError(f"k={k!r} must be a positive integer, or None to keep the whole vocabulary; 64 is usual.")
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r} must be a positive integer; the default is 4 GiB.")
        self.k = k
        self._entries: EntryMemory | EntryFolder = EntryMemory(max_bytes) if folder is None else EntryFolder(folder)
        self._model: weakref.ref[nn.Module] | None = None
        self._fingerprint: str | None = None

    def teacher(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor | TopTokens:
        """The teacher's predictions for a batch, from the cache where they are there.

        All processes of a sharded model must call it together, as they call the model.

        Args:
            model: a language model or token classifier with adapters, always on the same base model.
            batch: keyword arguments of its forward.

        Returns:
            Logits [batch, length, vocabulary], or the likeliest tokens [batch, length, k]; zeros at padding.

        Raises:
            ValueError: if predictions of another base model are kept here (or of this one before its biases were
                trained), or the batch has inputs other than tokens, or a row has a hole in its attention mask, or
                positions that do not count from 0, or the model has logits of sequences, not of tokens.
            FloatingPointError: if the base model predicts NaN or infinity.
        """
        self.claim(model)
        sequences = list(_sequences(batch))
        entries = {}
        for sequence in sequences:
            entry = self._entries.get(sequence.key)
            if entry is not None and self._fits(entry, len(sequence.tokens)):
                entries[sequence.key] = entry
        missing = {s.key: s.tokens for s in sequences if s.key not in entries}
        # Each pass of a sharded model waits for the other processes: where one has to run it, all do, and once.
        sharded = is_sharded(model)
        if in_any_process(bool(missing), batch["input_ids"].device) if sharded else missing:
            self._check_drift(model)
            at_once = math.inf if sharded else batch["input_ids"].numel()
            for part in _of_like_lengths(missing, at_once):
                found = self._run(model, [missing[key] for key in part], batch["input_ids"])
                for key, entry in zip(part, found, strict=True):
                    self._entries[key] = entries[key] = entry
        placed = {
            name: _place(batch["input_ids"], [(s, entries[s.key][name]) for s in sequences])
            for name in (("logits",) if self.k is None else ("log_p", "ids"))
        }
        return placed["logits"] if self.k is None else TopTokens(placed["log_p"], placed["ids"].long())

    def claim(self, model: nn.Module) -> None:
        """Keep the predictions of this model's base, and of no other.

        To be called before its weights are packed, which do not tell what they were.

        Raises:
            ValueError: if those of another are kept here.
        """
        model = unwrapped(model)
        if self._model is not None and self._model() is model:
            return
        fingerprint = base_fingerprint(model)
        if self._fingerprint not in (None, fingerprint):
            raise ValueError("the cache holds the predictions of another base model; make a TeacherCache for each.")
        if isinstance(self._entries, EntryFolder):
            self._entries.claim(self.k, fingerprint)
        self._model, self._fingerprint = weakref.ref(model), fingerprint

    def _check_drift(self, model: nn.Module) -> None:
        if trained_base_parameters(model) and base_fingerprint(model) != self._fingerprint:
            raise ValueError(
                "parameters of the base model (biases, say) have been trained since the cache was made, and sequences "
                "that it lacks would get another teacher; fill it before training, cache.teacher(model, batch) for "
                "each batch of the data."
            )

    def _fits(self, entry: Entry, length: int) -> bool:
        """Whether an entry is one of this cache's for so many tokens, as one from a file might not be."""
        if self.k is None:
            return entry.keys() == {"logits"} and entry["logits"].dim() == 2 and len(entry["logits"]) == length
        if entry.keys() != {"log_p", "ids"} or any(tensor.dim() != 2 for tensor in entry.values()):
            return False
        k, columns = entry["ids"].shape[1], entry["log_p"].shape[1]
        return len(entry["ids"]) == len(entry["log_p"]) == length and k <= self.k and columns - k in (0, 1)

    def _run(self, model: nn.Module, sequences: list[torch.Tensor], like: torch.Tensor) -> list[Entry]:
        """Run the teacher on sequences, padded on the right, on the device of `like`; of none, on a token."""
        run = sequences or [torch.zeros(1, dtype=torch.long)]
        ids = nn.utils.rnn.pad_sequence(run, batch_first=True).to(like)
        lengths = torch.tensor([len(tokens) for tokens in run], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        all_logits = teacher_logits(model, {"input_ids": ids, "attention_mask": mask})
        if all_logits.dim() != 3:
            raise ValueError(
                f"a TeacherCache keeps logits [batch, length, classes], and those of a "
                f"{type(base_model(unwrapped(model))).__name__} are {list(all_logits.shape)}; distil without a cache."
            )
        return [self._entry(logits[: len(tokens)]) for logits, tokens in zip(all_logits, sequences, strict=False)]

    def _entry(self, logits: torch.Tensor) -> Entry:
        """What is kept of a sequence's logits [length, vocabulary]."""
        if (logits.isnan() | logits.isposinf()).any():  # -inf says that a token is impossible
            raise FloatingPointError(
                f"the base model predicts NaN or infinity for a sequence of {len(logits)} tokens, which is not kept; "
                "check the base model and its dtype."
            )
        if self.k is None:
            return {"logits": logits.cpu().clone()}
        top = TopTokens.of(logits, self.k)
        return {"log_p": top.log_p.clamp(min=SMALLEST_KEPT).half().cpu(), "ids": top.ids.int().cpu()}


def _of_like_lengths(sequences: dict[str, torch.Tensor], tokens: float) -> Iterator[list[str]]:
    """Keys of sequences to run together, none padded to more than so many tokens in all; one at least."""
    part: list[str] = []
    for key in sorted(sequences, key=lambda key: len(sequences[key])):
        if part and (len(part) + 1) * len(sequences[key]) > tokens:
            yield part
            part = []
        part.append(key)
    yield part


def _sequences(batch: dict[str, Any]) -> Iterator[_Sequence]:
    """The sequences of a batch, row by row."""
    strange = [key for key, value in batch.items() if isinstance(value, torch.Tensor) and key not in _KNOWN]
    if strange or not isinstance(batch.get("input_ids"), torch.Tensor):
        raise ValueError(
            f"a TeacherCache knows a sequence by its input_ids alone, but the batch has {strange or list(batch)}; "
            "distil without a cache."
        )
    ids, mask, positions = batch["input_ids"].long().cpu(), batch.get("attention_mask"), batch.get("position_ids")
    for name, given in (("attention_mask", mask), ("position_ids", positions)):
        if given is not None and (given.dim() != 2 or given.shape[1] != ids.shape[1]):
            raise ValueError(
                f"a TeacherCache takes {name} of the input_ids' shape {list(ids.shape)}, not {list(given.shape)}; "
                "distil without a cache."
            )
    mask = torch.ones_like(ids).bool() if mask is None else mask.bool().cpu()
    positions = None if positions is None else positions.cpu().expand_as(ids)
    for row, (tokens, attended) in enumerate(zip(ids, mask, strict=True)):
        where = attended.nonzero().flatten()
        if not len(where):
            continue
        start, stop = int(where[0]), int(where[-1]) + 1
        if stop - start != len(where):
            raise ValueError(
                f"row {row} of the attention_mask has a hole; a TeacherCache takes padding at the ends of a row."
            )
        firsts = [start] if positions is None else _firsts(positions[row, start:stop], start, row)
        for first, end in zip(firsts, [*firsts[1:], stop], strict=True):
            yield _Sequence(tokens[first:end].contiguous(), row, first)


def _firsts(positions: torch.Tensor, start: int, row: int) -> list[int]:
    """Where in the row each of the sequences packed into it begins: where position_ids are 0."""
    firsts = (positions == 0).nonzero().flatten()
    index = torch.arange(len(positions))
    begun = torch.searchsorted(firsts, index, right=True) - 1
    if not len(firsts) or firsts[0] != 0 or not torch.equal(positions.long(), index - firsts[begun]):
        raise ValueError(f"row {row} of the position_ids does not count from 0; a TeacherCache needs whole sequences.")
    return (firsts + start).tolist()


def _place(like: torch.Tensor, parts: list[tuple[_Sequence, torch.Tensor]]) -> torch.Tensor:
    """Predictions [length, n] of each sequence at its place in a batch, zeros elsewhere: [batch, length, n]."""
    if not parts:
        raise ValueError("no row of the batch attends to any token; check its attention_mask.")
    placed = parts[0][1].new_zeros(*like.shape, parts[0][1].shape[1])
    for sequence, values in parts:
        placed[sequence.row, sequence.start : sequence.start + len(values)] = values
    return placed.to(like.device)
