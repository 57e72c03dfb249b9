"""The arguments of `finetune.py`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from data import InputError

from peft_dlqat import DLQATConfig
from peft_dlqat.train.recipe import RECIPE

EMBEDDED_MODEL = Path(__file__).parent / "embedded" / "model"

# For the embedded model, the rates are the best of a few that were tried with 240 steps, by held-out perplexity: so
# small a model, and so few steps to text of another kind, take higher ones than LoRA's usual rate, which others get.
EMBEDDED_DEFAULTS = {"steps": 240, "group_size": -1, "schedule": "cosine", "lr": 1e-3, "lora_lr": 1e-2}
DEFAULTS = {"steps": 1000, "group_size": 128, "schedule": "linear", "lr": 2e-4, "lora_lr": 2e-4}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_argument_group("what is given")
    given.add_argument("--model", help="Hub id or folder of a causal language model; default: the embedded one")
    given.add_argument("--dataset", help="Hub id, file or folder; default: Python's language reference")
    given.add_argument("--dataset_config", help="configuration of the dataset")
    given.add_argument("--split", default="train", help="split to train on, such as train or train[:10%%]")
    given.add_argument("--eval_split", help="split to measure on; default: the last tenth of the training text")
    given.add_argument("--eval_blocks", type=positive, default=200, help="measure on at most so many blocks")
    given.add_argument("--text_column", default="text")
    given.add_argument("--metric", help="a metric of `evaluate` to report too: Hub id or path of a script")
    given.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the base model"
    )
    method = parser.add_argument_group("method")
    method.add_argument("--bits", type=int, nargs="+", default=[3, 2], help="widths, each fine-tuned by itself")
    method.add_argument(
        "--group_size", type=int, help=f"inputs that share a scale; -1: a whole row; {_defaults('group_size')}"
    )
    method.add_argument("--zero_point", choices=["none", "integer", "float"], default="none")
    method.add_argument("--r", type=positive, default=8, help="rank, of DL-QAT and LoRA")
    method.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="""other settings of DLQATConfig, such as scale_dtype=float16 storage=int8 'export=["gguf"]'""",
    )
    method.add_argument("--steps", type=positive, help=f"optimiser steps of each method; {_defaults('steps')}")
    method.add_argument(
        "--calibration_steps", type=int, default=RECIPE.calibration_steps, help="of these, steps that calibrate"
    )
    method.add_argument("--batch_size", type=positive, default=4, help="blocks a step")
    method.add_argument("--length", type=positive, default=256, help="tokens a block")
    method.add_argument("--schedule", help=f"transformers' name of the learning rate's; {_defaults('schedule')}")
    method.add_argument("--lr", type=float, help=f"of DL-QAT; {_defaults('lr')}")
    method.add_argument(
        "--calibration_lr", type=float, default=RECIPE.calibration_lr, help="of DL-QAT's calibration, see `calibrate`"
    )
    method.add_argument("--lora_lr", type=float, help=f"of LoRA; {_defaults('lora_lr')}")
    method.add_argument("--seed", type=int, default=0)
    method.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="train LoRA too, and round it; default: only without --model and --dataset",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="upload the adapter, one repository a bit width")
    parser.add_argument("--demo", action="store_true", help="the embedded model and text; the same as neither given")
    parser.add_argument("--smoke", action="store_true", help="only see that everything runs: a few short steps")
    return parser


def _defaults(name: str) -> str:
    return f"default: {DEFAULTS[name]}, with the embedded model {EMBEDDED_DEFAULTS[name]}"


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def _setting(entry: str, args: argparse.Namespace) -> tuple[str, Any]:
    """A field of the config and its value: JSON, or else a word."""
    name, equals, value = entry.partition("=")
    known = set(DLQATConfig.__annotations__)
    if name in vars(args):
        raise InputError(f"--set {entry}: {name} has an argument of its own, --{name}.")
    if not equals or name not in known:
        raise InputError(
            f"--set {entry} must be NAME=VALUE, with a name among {', '.join(sorted(known - {*vars(args)}))}."
        )
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def complete(args: argparse.Namespace) -> None:
    """Fill in what depends on other arguments, and refuse what does not go together."""
    embedded = args.model is None and args.dataset is None
    if args.demo and not embedded:
        raise InputError("--demo is the embedded model and text; leave it out to use --model and --dataset.")
    if args.model is not None and args.dataset is None:
        raise InputError("--model needs a --dataset: an id on the Hub, a file or a folder.")
    for name, value in (EMBEDDED_DEFAULTS if args.model is None else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.smoke:
        args.steps, args.length, args.batch_size, args.eval_blocks = 6, 64, 4, 8
    if not 0 <= args.calibration_steps < args.steps:
        raise InputError(
            f"--calibration_steps {args.calibration_steps} are taken out of --steps {args.steps}, so there must be "
            f"fewer; {RECIPE.calibration_steps} is the default."
        )
    args.bits = list(dict.fromkeys(args.bits))
    args.set = dict(_setting(entry, args) for entry in args.set)
    args.compare = embedded if args.compare is None else args.compare
    args.model_name = "the embedded model" if args.model is None else Path(args.model).name
    args.model = str(EMBEDDED_MODEL) if args.model is None else args.model
    args.text_name = "Python's language reference" if args.dataset is None else Path(args.dataset).name
