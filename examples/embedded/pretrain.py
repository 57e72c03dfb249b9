# SPDX-License-Identifier: Apache-2.0
"""Trains the small language model in `examples/embedded/model` on the standard library's docstrings.

    python examples/embedded/pretrain.py

trains a byte-level BPE tokenizer and a small Llama model from scratch, on a CPU, in some minutes. The tokenizer and
the model see the training docstrings only (`text.docstrings`, `text.split`); the language reference (`text.topics`)
is left for fine-tuning. The weights kept are those with the lowest loss on the held-out docstrings.

    python examples/embedded/pretrain.py --shape gpt2 --epochs 2
    python examples/embedded/pretrain.py --shape opt --epochs 2

make models of other shapes and about the same size, in outputs/gpt2 and outputs/opt, for the benchmark of shapes.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from text import chunks, docstrings, split, token_blocks, token_stream, topics
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TRAINING = ("batch", "block", "epochs", "lr", "weight_decay", "attention_dropout")  # arguments that the card names

CARD = """\
---
language: en
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---

# A small language model of Python's docstrings

A {shape} model of {parameters:,} parameters ({layers} layers, hidden size {hidden}, {heads} attention heads,
{kv_heads} key-value heads, vocabulary {vocab}, tied embeddings), pretrained from scratch on the docstrings of Python's
standard library. It is a base model to try quantization and fine-tuning on, on any machine and without a download. It
has learnt the look of Python documentation and little of its content: it is of no use as an assistant.

## How it was made

    {command}

with Python {python}, whose standard library is the training text, PyTorch {torch} and Transformers {transformers}.
Another Python version gives slightly different text, and another machine slightly different rounding.

* Text: module, class and function docstrings of the standard library, each kept once: {train_chars:,} characters
  ({train_tokens:,} tokens) for training, {heldout_chars:,} characters held out by a hash of the module's name. The
  tokenizer (byte-level BPE) was trained on the training docstrings only. Python's language reference
  (`pydoc_data.topics`) was not used, so it can serve as new text for fine-tuning.
* Training: {steps:,} steps of {batch} blocks of {block} tokens (at most {epochs} epochs), AdamW, learning rate {lr:g}
  with warm-up and cosine decay, weight decay {weight_decay:g}, attention dropout {attention_dropout:g}, bfloat16
  autocast. Texts follow one another with `</s>` between; `<s>` is not used in training.
* The weights are those of step {best_step:,}, which had the lowest held-out docstring loss, stored in bfloat16.

## Loss

Mean over blocks of {block} tokens, of this folder's weights computed in float32.

| text | tokens | nats per token | bits per byte |
| --- | ---: | ---: | ---: |
{losses}

The held-out docstrings chose the step to keep; the language reference chose nothing.

## Licence

The text is the documentation and the docstrings of Python, copyright Python Software Foundation, under the
[PSF licence](https://docs.python.org/3/license.html). The weights and the tokenizer derive from that text alone. The
script that makes them is under the Apache-2.0 licence of the project that it belongs to.
"""


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with BOS, EOS and padding tokens; it adds none of them itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def llama(dropout: float, **common: Any) -> PreTrainedConfig:
    """All linear layers but the head have 256 or 768 input features."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=dropout,
        **common,
    )


def gpt2(dropout: float, **common: Any) -> PreTrainedConfig:
    """All linear layers but the head have 256 or 1024 input features, and biases; weights are stored transposed."""
    return GPT2Config(
        n_embd=256, n_layer=3, n_head=4, n_positions=512, attn_pdrop=dropout, resid_pdrop=0.0, embd_pdrop=0.0, **common
    )


def opt(dropout: float, **common: Any) -> PreTrainedConfig:
    """As `gpt2`, with ReLU, whose zeros are many of a layer's inputs, and weights stored as usual."""
    return OPTConfig(
        hidden_size=256,
        ffn_dim=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=256,
        attention_dropout=dropout,
        dropout=0.0,
        **common,
    )


# By the name of the shape: how it is written, and its config.
SHAPES: dict[str, tuple[str, Callable[..., PreTrainedConfig]]] = {
    "llama": ("Llama", llama),
    "gpt2": ("GPT-2", gpt2),
    "opt": ("OPT", opt),
}


def new_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> PreTrainedModel:
    """A freshly initialised model of the shape that is asked for."""
    config = SHAPES[args.shape][1](
        args.attention_dropout,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def loss_of(model: torch.nn.Module, blocks: torch.LongTensor, batch: int = 16, bf16: bool = False) -> float:
    """Mean next-token loss, in nats per token, over blocks [n, length]."""
    training = model.training
    model.eval()
    total = 0.0
    for ids in blocks.split(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    model.train(training)
    return total / len(blocks)


def optimizer_of(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices and none on norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


def epoch_blocks(stream: torch.LongTensor, length: int, generator: torch.Generator) -> torch.LongTensor:
    """The stream [tokens] cut in blocks from a random offset, in random order: [n, length]."""
    offset = int(torch.randint(length, (1,), generator=generator))
    n = (stream.numel() - offset) // length
    blocks = stream[offset : offset + n * length].view(n, length)
    return blocks[torch.randperm(n, generator=generator)]


def train(
    model: PreTrainedModel, stream: torch.LongTensor, heldout: torch.LongTensor, args: argparse.Namespace
) -> tuple[int, int]:
    """Trains on a token stream [tokens] and leaves the best weights in the model.

    Returns:
        The number of steps of the schedule, and the step with the lowest loss on `heldout` [n, length].
    """
    steps = args.steps or args.epochs * ((stream.numel() - args.block) // args.block // args.batch)
    optimizer = optimizer_of(model, args)
    generator = torch.Generator().manual_seed(args.seed)

    def factor(step: int) -> float:
        if step < args.warmup:
            return (step + 1) / args.warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, steps - args.warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    best, best_step, best_state = math.inf, 0, None
    running = None
    blocks = torch.empty(0, args.block, dtype=torch.long)
    model.train()
    bar = tqdm(range(1, steps + 1), desc="pretrain", unit="step")
    for step in bar:
        if len(blocks) < args.batch:
            blocks = epoch_blocks(stream, args.block, generator)
        ids, blocks = blocks[: args.batch], blocks[args.batch :]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % args.eval_every == 0 or step == steps:
            value = loss_of(model, heldout, bf16=True)
            if value < best:
                best, best_step, best_state = value, step, copy.deepcopy(model.state_dict())
            bar.set_postfix(train=f"{running:.3f}", heldout=f"{value:.3f}", best=f"{best:.3f}")
            bar.write(f"step {step:5d}  train {running:.3f}  heldout {value:.3f}")
    model.load_state_dict(best_state)
    model.eval()
    return steps, best_step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama")
    parser.add_argument(
        "--output", type=Path, help="folder to save in; default: model beside this script, other shapes in outputs/"
    )
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--block", type=int, default=256, help="tokens per block")
    parser.add_argument("--batch", type=int, default=8, help="blocks per step")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="instead of those of all epochs, to try things out")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--eval-every", type=int, default=200, help="steps between held-out losses")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.command = "python examples/embedded/pretrain.py"
    for name, value in vars(args).items():
        if name not in ("output", "command") and value != parser.get_default(name):
            args.command += f" --{name.replace('_', '-')} {value}"
    if args.output is None:
        args.output = Path(__file__).parent / "model" if args.shape == "llama" else Path("outputs", args.shape)
    return args


def main() -> None:
    import transformers

    args = parse_args()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train_texts, heldout_texts = split(docstrings())
    train_topics, heldout_topics = split(chunks(topics()))
    tokenizer = train_tokenizer(train_texts, args.vocab_size, max_length=512)
    stream = token_stream(train_texts, tokenizer)
    heldout = token_blocks(heldout_texts, tokenizer, args.block)
    model = new_model(tokenizer, args)
    print(f"{model.num_parameters():,} parameters, {stream.numel():,} training tokens, {heldout.numel():,} held out")
    steps, best_step = train(model, stream, heldout, args)

    # A choice of this training, not of those that start from the saved model.
    setattr(model.config, "attn_pdrop" if args.shape == "gpt2" else "attention_dropout", 0.0)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    rows = []
    for name, texts in {
        "docstrings, held out": heldout_texts,
        "language reference, all": train_topics + heldout_topics,
        "language reference, held out": heldout_topics,
    }.items():
        blocks = token_blocks(texts, tokenizer, args.block)
        value = loss_of(model, blocks)
        size = len("\n".join(texts).encode("utf-8"))
        bits = value / math.log(2) * token_stream(texts, tokenizer).numel() / size
        rows.append(f"| {name} | {blocks.numel():,} | {value:.3f} | {bits:.3f} |")
        print(f"{name}: {value:.4f} nats per token")

    config = model.config
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        shape=SHAPES[args.shape][0],
        vocab=config.vocab_size,
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        train_chars=sum(map(len, train_texts)),
        train_tokens=stream.numel(),
        heldout_chars=sum(map(len, heldout_texts)),
        steps=steps,
        best_step=best_step,
        losses="\n".join(rows),
        **{key: value for key, value in vars(args).items() if key in ("command", *TRAINING)},
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
    print(f"saved in {args.output}")


if __name__ == "__main__":
    main()
