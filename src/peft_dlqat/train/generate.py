"""Training data out of the model itself, where there is none: what LLM-QAT (arXiv 2305.17888, sec. 3.1) trains on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ..console import progress_bar
from ..placement import device_of
from ..running import adapters_disabled, base_model, evaluating, is_encoder_decoder

if TYPE_CHECKING:
    from datasets import Dataset

# So many tokens after the first are the likeliest ones, as a random first token needs some context to make sense of.
_GREEDY_TOKENS = (3, 5)


class _GreedyStart(LogitsProcessor):
    """Leaves only the likeliest token, for as many steps as each row (of [batch]) asks for."""

    def __init__(self, prompt_length: int, steps: torch.Tensor) -> None:
        self.until = prompt_length + steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        greedy = (input_ids.shape[1] < self.until)[:, None]
        likeliest = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), True)
        return scores.masked_fill(greedy & ~likeliest, -torch.inf)


def generate_dataset(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    n: int,
    *,
    length: int = 256,
    batch_size: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Sequences that the full-precision model makes up, to train on without data of one's own.

    Each begins with a random token of the vocabulary (after the tokenizer's beginning-of-sequence token, if it has
    one; special tokens are left out). The next 3 to 5 are the likeliest ones; the others are drawn from the model's
    distribution, whatever its generation config says, up to an end-of-sequence token or `length`. The same seed gives
    the same data; random number generators and the model's mode (train or eval) are left as they were.

    Args:
        model: a causal language model; adapters that it has, merged or not, are switched off meanwhile.
        tokenizer: says which tokens are special; without one, the model's generation config does.
        n: sequences.
        length: tokens of a sequence, at most.
        batch_size: sequences generated at a time.
        temperature: of the sampling; 1 is the model's own distribution.
        seed: of the first tokens and the sampling.
        progress: show a progress bar.

    Returns:
        A `datasets.Dataset` of n rows: `input_ids`, and `attention_mask`, all ones. A collator such as
        DataCollatorForLanguageModeling(tokenizer, mlm=False) pads them and makes labels.

    Raises:
        ValueError: for an impossible argument, a length above the model's context, or a model that cannot generate.
    """
    from datasets import Dataset  # here: whoever has data of their own may do without it

    for name, value in (("n", n), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")
    if not isinstance(temperature, float | int) or isinstance(temperature, bool) or not 0 < temperature < torch.inf:
        raise ValueError(f"temperature={temperature!r} must be a positive number; 1 is the model's own distribution.")
    if is_encoder_decoder(model) or not hasattr(model, "generate"):
        raise ValueError(
            f"{type(model).__name__} is no causal language model that can generate; bring data of your own."
        )
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    context = getattr(config, "max_position_embeddings", None)
    bos, ends, special = _special_tokens(model, tokenizer)
    shortest = 2 if bos is None else 3
    if not isinstance(length, int) or isinstance(length, bool) or length < shortest:
        raise ValueError(f"length={length!r} must be an integer, at least {shortest}: the first tokens and one more.")
    if context is not None and length > context:
        raise ValueError(f"length={length} is above the model's context of {context} tokens; use at most that.")

    vocabulary = min(config.vocab_size, len(tokenizer)) if tokenizer is not None else config.vocab_size
    first_tokens = torch.tensor([token for token in range(vocabulary) if token not in special])
    settings = _settings(length - shortest + 1, temperature, ends)
    device = device_of(model)
    rows: list[list[int]] = []
    bar = progress_bar(total=n, desc="generating", shown=progress)
    with bar, torch.random.fork_rng(devices=range(torch.cuda.device_count())), evaluating(model):
        torch.manual_seed(seed)
        while len(rows) < n:
            count = min(batch_size, n - len(rows))
            prompt = first_tokens[torch.randint(len(first_tokens), (count, 1))]
            if bos is not None:
                prompt = torch.cat([torch.full_like(prompt, bos), prompt], 1)
            greedy = torch.randint(_GREEDY_TOKENS[0], _GREEDY_TOKENS[1] + 1, (count,))
            made = _generate(model, prompt.to(device), greedy.to(device), settings)
            rows += [_up_to_end(row, prompt.shape[1], ends) for row in made.tolist()]
            bar.update(count)
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


@torch.no_grad()
def _generate(
    model: nn.Module, prompt: torch.Tensor, greedy: torch.Tensor, settings: GenerationConfig
) -> torch.Tensor:
    """Continue a prompt [batch, tokens], greedily for greedy [batch] steps: [batch, length], padded after an end."""
    base = base_model(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()  # generate takes from it what its argument leaves unset
    try:
        with adapters_disabled(model):
            return base.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_GreedyStart(prompt.shape[1], greedy)]),
            )
    finally:
        base.generation_config = own


def _settings(new_tokens: int, temperature: float, ends: list[int]) -> GenerationConfig:
    """Plain sampling."""
    return GenerationConfig(
        do_sample=True,
        temperature=float(temperature),
        top_k=0,
        max_new_tokens=new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # fills rows that have ended, and is cut off again
    )


def _special_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int | None, list[int], set[int]]:
    """The token that begins a sequence, those that end one, and all that no sequence should start with."""
    config: Any = getattr(model, "generation_config", None)
    source = config if tokenizer is None else tokenizer
    bos = getattr(source, "bos_token_id", None)
    ends: list[int] = []
    for end in (getattr(config, "eos_token_id", None), getattr(source, "eos_token_id", None)):
        ends += end if isinstance(end, list) else [] if end is None else [end]
    known = [bos, *ends, getattr(source, "pad_token_id", None), *getattr(tokenizer, "all_special_ids", [])]
    return bos, sorted(set(ends)), {token for token in known if token is not None}


def _up_to_end(row: list[int], prompt_length: int, ends: list[int]) -> list[int]:
    """A sequence up to its first end-of-sequence token, that one included."""
    stops = [i for i, token in enumerate(row) if i >= prompt_length and token in ends]
    return row[: stops[0] + 1] if stops else row
