"""Fine-tune a causal language model to a low-bit one with DL-QAT, and compare with rounding it afterwards.

    python examples/finetune.py

takes the small Llama model in examples/embedded/model and Python's language reference, a text which that model has
never seen, and fine-tunes the one on the other, without a download and in some minutes on two CPU cores:

* with LoRA in full precision, the best that fine-tuning does here, and then rounds the result to the nearest codes;
* with DL-QAT at 3 and at 2 bits, one scale a row, where the low-rank update is trained inside the quantizer. The
  steps, batches, rank and learning-rate schedule are LoRA's; the calibration steps are taken out of the same number.

Your own model and text, from the Hub or from a disk (`--compare` adds the LoRA rows, `--set NAME=VALUE` other settings
of the config):

    python examples/finetune.py --model Qwen/Qwen3-0.6B --dtype bfloat16 --bits 3 --steps 2000 \\
        --dataset Salesforce/wikitext --dataset_config wikitext-2-raw-v1 --output_dir outputs/qwen3-3bit

For the embedded model, the learning rate of each method is the best of three or four that were tried.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

# Idle threads sleep rather than spin. Beside another busy program, spinning ones make every step many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import evaluate
import torch
from arguments import complete, make_parser
from data import InputError, dataset_blocks, embedded_blocks
from metrics import evaluate_model, load_metric
from peft import LoraConfig, PeftModel, get_peft_model
from plots import draw_bars, draw_curves
from results import BASE, DLQAT, LORA, LORA_CLIPPED, LORA_RTN, NOTE, RTN, Result, save, text_table, verdicts
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from peft_dlqat import DLQATCallback, DLQATConfig, DLQATLayer

Curve = list[dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """Run everything.

    Returns:
        The exit status: 0, or 1 if a reloaded or merged adapter gave other logits than the trained one.
    """
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    try:
        complete(args)
        check_model(args)
        metric = None if args.metric is None else load_metric(args.metric)
        tokenizer, train, held_out = load_text(args)
    except InputError as error:
        parser.error(str(error))
    started = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings(
        "ignore", r"`(is_)?gradient_checkpointing", FutureWarning
    )  # raised by peft 0.21's own code
    logging.disable_progress_bar()  # of loading weights, which is done for each method; training has its own
    print(f"{args.model_name}: {len(train):,} blocks of {args.length} tokens to train on, {len(held_out):,} held out")
    results, curves, exact = compare_methods(args, tokenizer, train, held_out, metric)

    save(args.output_dir, results, curves, {key: str(value) for key, value in vars(args).items()})
    draw_curves(curves, args.calibration_steps, args.output_dir / "curves.png")
    draw_bars(results, args.output_dir / "perplexity.png")
    print("\n\n" + text_table(results, f"{args.model_name} on {args.text_name}, {args.steps} steps"))
    print(textwrap.fill(NOTE, 100), "", *verdicts(results), sep="\n")
    for bits, equal in exact.items():
        verdict = "are equal (torch.equal)" if equal else "DIFFER"
        print(f"{bits} bits: logits of the trained, the reloaded and the merged model {verdict}.")
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} s; adapters, results.md, results.json and two pictures are in {args.output_dir}")
    return 0 if all(exact.values()) else 1


def compare_methods(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
    metric: evaluate.EvaluationModule | None,
) -> tuple[list[Result], dict[str, Curve], dict[int, bool]]:
    """Every row of the table, the training curves, and, by bits, whether the saved adapter is exactly the trained."""
    results: list[Result] = []
    curves: dict[str, Curve] = {}
    exact: dict[int, bool] = {}

    def measure(method: str, bits: int | None, model: PreTrainedModel | PeftModel, trained_share: float = 0.0) -> None:
        loss, accuracy, metrics = evaluate_model(model, held_out, args.batch_size, metric, f"{method} {bits or ''}")
        width = stored_bits(args.model) if bits is None else bits_per_weight(model)
        results.append(Result(method, bits, width, trained_share, loss, accuracy, metrics))

    measure(BASE, None, load_model(args))
    lora = None
    if args.compare:
        lora, share, curves[LORA] = train_lora(args, train, held_out)
        measure(LORA, None, lora, share)
    for bits in args.bits:
        measure(RTN, bits, round_to_nearest(load_model(args), bits, args))
        if lora is not None:
            for method, init in ((LORA_RTN, "minmax"), (LORA_CLIPPED, "mse")):
                rounded = round_to_nearest(lora, bits, args, init)
                measure(method, bits, rounded, share)
                lora = rounded.unload()
        model, dlqat_share, curves[f"{DLQAT}, {bits} bits"] = train_dlqat(args, bits, train, held_out)
        measure(DLQAT, bits, model, dlqat_share)
        folder = args.output_dir / f"dlqat-{bits}bit"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        exact[bits] = is_exact(args, model, folder, held_out)
        if args.push_to_hub:
            repository = args.push_to_hub if len(args.bits) == 1 else f"{args.push_to_hub}-{bits}bit"
            model.push_to_hub(repository)
            tokenizer.push_to_hub(repository)
    return results, curves, exact


# --- the methods ---------------------------------------------------------------------------------------------------


def train_dlqat(
    args: argparse.Namespace, bits: int, train: datasets.Dataset, held_out: datasets.Dataset
) -> tuple[PeftModel, float, Curve]:
    """DL-QAT: calibrate for some of the steps, then train A, B and m through the quantizer for the others."""
    set_seed(args.seed)
    model = get_peft_model(load_model(args), dlqat_config(args, bits))
    trainer = Trainer(
        model,
        training_arguments(args, args.lr, args.steps - args.calibration_steps),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=[DLQATCallback(args.calibration_steps, args.calibration_lr)],
    )
    return model, trained_share(model), run(trainer, f"{DLQAT}, {bits} bits")


def train_lora(
    args: argparse.Namespace, train: datasets.Dataset, held_out: datasets.Dataset
) -> tuple[PreTrainedModel, float, Curve]:
    """LoRA in full precision, merged: the ceiling, and what is rounded afterwards."""
    set_seed(args.seed)
    config = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(args), config)
    share = trained_share(model)
    trainer = Trainer(
        model,
        training_arguments(args, args.lora_lr, args.steps),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
    )
    curve = run(trainer, LORA)
    return model.merge_and_unload(), share, curve


def dlqat_config(args: argparse.Namespace, bits: int) -> DLQATConfig:
    own = {"bits": bits, "group_size": args.group_size, "zero_point": args.zero_point, "r": args.r}
    return DLQATConfig(**{**own, "lora_alpha": args.r, "task_type": "CAUSAL_LM", **args.set})


def round_to_nearest(model: PreTrainedModel, bits: int, args: argparse.Namespace, init: str = "minmax") -> PeftModel:
    """A fresh adapter is exactly round-to-nearest with its first scales and zeros: B is zero and m is one."""
    return get_peft_model(model, replace(dlqat_config(args, bits), init=init))


def training_arguments(args: argparse.Namespace, lr: float, steps: int) -> TrainingArguments:
    return TrainingArguments(
        str(args.output_dir),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type=args.schedule,
        warmup_steps=0.025,  # a share of the steps
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        logging_steps=max(1, args.steps // 60),
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=max(1, args.steps // 4),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class LossOnBar(ProgressCallback):
    """The Trainer's progress bar with the losses on it, in the place of a printed line for every log entry."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.shown: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.shown.update({key: value for key, value in (logs or {}).items() if key in ("loss", "eval_loss")})
            self.training_bar.set_postfix(self.shown)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar."""


def run(trainer: Trainer, name: str) -> Curve:
    """Train, and return the log."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossOnBar(name))
    trainer.train()
    trainer.model.eval()
    return trainer.state.log_history


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


# --- what is measured ----------------------------------------------------------------------------------------------


def bits_per_weight(model: nn.Module) -> float:
    """Mean over the weights of the quantized layers."""
    layers = [module for module in model.modules() if isinstance(module, DLQATLayer)]
    sizes = [layer.frozen.original().numel() for layer in layers]
    bits = [layer.specs["default"].grid.bits_per_weight() for layer in layers]
    return sum(size * width for size, width in zip(sizes, bits, strict=True)) / sum(sizes)


def stored_bits(model: str) -> int:
    """Width of a weight in the model's own file."""
    return torch.finfo(AutoConfig.from_pretrained(model).dtype or torch.float32).bits


def trained_share(model: PeftModel) -> float:
    trained, total = model.get_nb_trainable_parameters()
    return trained / total


@torch.no_grad()
def is_exact(args: argparse.Namespace, model: PeftModel, folder: Path, held_out: datasets.Dataset) -> bool:
    """Whether the trained adapter, the one loaded from disk, and that one merged give the same logits, to the bit."""
    ids = held_out[: args.batch_size]["input_ids"].to(model.device)
    trained = model.eval()(input_ids=ids).logits
    reloaded_model = PeftModel.from_pretrained(load_model(args).to(model.device), folder).eval()
    reloaded = reloaded_model(input_ids=ids).logits
    merged = reloaded_model.merge_and_unload()(input_ids=ids).logits
    return torch.equal(trained, reloaded) and torch.equal(trained, merged)


# --- what is given -------------------------------------------------------------------------------------------------


def load_model(args: argparse.Namespace) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    return model.to("cuda") if torch.cuda.is_available() else model


def load_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, datasets.Dataset, datasets.Dataset]:
    """The tokenizer, and blocks of token ids to train on and to measure on."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the tokenizer of {args.model!r}: {error}") from error
    if args.dataset is None:
        train, held_out = embedded_blocks(tokenizer, args.length)
    else:
        train, held_out = dataset_blocks(
            args.dataset, args.dataset_config, args.split, args.eval_split, args.text_column, tokenizer, args.length
        )
    return tokenizer, train, held_out.select(range(min(len(held_out), args.eval_blocks)))


def check_model(args: argparse.Namespace) -> None:
    """Refuse a model, or a grid that it cannot take, before anything is loaded."""
    try:
        config = AutoConfig.from_pretrained(args.model)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what warns here warns again at its own time
            model = AutoModelForCausalLM.from_config(config)
            for bits in args.bits:
                model = get_peft_model(model, dlqat_config(args, bits)).unload()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot fine-tune {args.model!r}: {error}") from error
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and args.length > most:
        raise InputError(f"--length {args.length} is more than the {most} positions of {args.model}.")


if __name__ == "__main__":
    sys.exit(main())
