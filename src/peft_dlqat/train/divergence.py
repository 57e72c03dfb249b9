"""How far the model's next-token distributions are from the teacher's, token by token, in little memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Logits of one chunk: 64 MiB in float32, and several such tensors live while a chunk is worked on.
_CHUNK_ELEMENTS = 2**24
SMALLEST_KEPT = torch.finfo(torch.float16).min  # log-probabilities are kept in float16


@dataclass(frozen=True)
class TopTokens:
    """A teacher that is known by its k likeliest tokens at each position, the others being lumped together.

    Attributes:
        log_p: [..., k + 1] log-probabilities of the k tokens and, last, of all others; [..., k] where k is the whole
            vocabulary. They need sum to one only up to rounding.
        ids: [..., k] the tokens.
    """

    log_p: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int) -> TopTokens:
        """The k likeliest tokens of logits [..., vocabulary]; all of them where k is more than that."""
        ids = logits.topk(min(k, logits.shape[-1]), sorted=True).indices
        return cls(coarse_log_probabilities(logits, ids), ids)


def coarse_log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., k + 1] of some tokens (ids [..., k]) and of all others together; float32.

    The last column is left out where ids is the whole vocabulary. It is summed over the other tokens: 1 - (the sum
    over these) would cancel where they have almost all the probability.
    """
    log_p = logits.float().log_softmax(-1)
    chosen = log_p.gather(-1, ids)
    if ids.shape[-1] == logits.shape[-1]:
        return chosen
    others = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others], -1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last dimension, in nats; what has no probability in p adds nothing."""
    impossible = log_p.isneginf()
    log_p, log_q = (values.masked_fill(impossible, torch.finfo(values.dtype).min) for values in (log_p, log_q))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def token_divergence(
    logits: torch.Tensor, teacher: torch.Tensor | TopTokens, reverse: float | torch.Tensor = 0.0
) -> torch.Tensor:
    """(1 - reverse) * KL(teacher || model) + reverse * KL(model || teacher) at each position, in nats; float32 [...].

    Against [`TopTokens`] it is that of the coarse distributions, k tokens and one bucket for the rest, which is at
    most the full one (data-processing inequality), and equal to it where k is the vocabulary.

    Args:
        logits: the model's, [..., vocabulary]; the result is differentiable in them.
        teacher: logits of the same shape, or its likeliest tokens.
        reverse: weight of the reverse divergence.
    """
    if isinstance(teacher, TopTokens):
        return by_chunks(lambda z, log_p, ids: _coarse(z, log_p, ids, reverse), logits, teacher.log_p, teacher.ids)
    return by_chunks(
        lambda z, t: _mixed(t.float().log_softmax(-1), z.float().log_softmax(-1), reverse), logits, teacher
    )


def _coarse(
    logits: torch.Tensor, log_p: torch.Tensor, ids: torch.Tensor, reverse: float | torch.Tensor
) -> torch.Tensor:
    # log_softmax: what was rounded for keeping sums to one again.
    return _mixed(log_p.float().log_softmax(-1), coarse_log_probabilities(logits, ids), reverse)


def _mixed(log_p: torch.Tensor, log_q: torch.Tensor, reverse: float | torch.Tensor) -> torch.Tensor:
    if isinstance(reverse, float | int) and reverse == 0:
        return kl(log_p, log_q)
    if isinstance(reverse, float | int) and reverse == 1:
        return kl(log_q, log_p)
    return (1 - reverse) * kl(log_p, log_q) + reverse * kl(log_q, log_p)


@torch.no_grad()
def confidence(teacher: torch.Tensor | TopTokens) -> torch.Tensor:
    """The probability that the teacher gives its likeliest token, float32 [...]."""
    if isinstance(teacher, TopTokens):
        return teacher.log_p.float().log_softmax(-1)[..., : teacher.ids.shape[-1]].amax(-1).exp()
    return by_chunks(lambda t: t.float().log_softmax(-1).amax(-1).exp(), teacher)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log q(target) at each position, float32 [...]; 0 where the target is -100.

    Args:
        logits: [..., classes].
        targets: [...], integer.
    """
    return by_chunks(lambda z, y: F.cross_entropy(z.float(), y, reduction="none"), logits, targets)


def by_chunks(function: Callable[..., torch.Tensor], logits: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """A function of single positions, computed for some positions at a time.

    A vocabulary's worth of float32 a token, several times over, is more memory than many a model. So the intermediate
    results of a chunk are dropped, and computed anew for the backward pass.

    Args:
        function: takes chunks [n, ...] of each tensor and returns [n].
        logits: [..., vocabulary].
        others: further tensors with logits' leading dimensions, to be cut likewise.

    Returns:
        [...], the leading dimensions of logits.
    """
    leading = logits.shape[:-1]
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    rows = [tensor.flatten(0, len(leading) - 1) if len(leading) > 1 else tensor for tensor in (logits, *others)]
    if rows[0].shape[0] <= size:
        return function(*rows).view(leading)
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    results = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(results).view(leading)
