"""`dlqat`: the package on the command line. Each command is a few calls of the Python API."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..formats import FORMATS
from .destination import DESTINATIONS

_EPILOG = """the shortest way from a model on the Hub to a file for llama.cpp:

  dlqat train --model Qwen/Qwen3-0.6B --dataset tatsu-lab/alpaca --to gguf:Q3_K --output qwen

`dlqat train --help` lists all settings, TRL's and the Trainer's among them; --config FILE.yaml reads them from a file.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 for an error, which is told in a line, or where an engine disagrees with an exported
        file; 2 for arguments that are none (argparse's own); 130 when interrupted. With DLQAT_TRACEBACK=1 in the
        environment, errors are raised as they are.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:  # whose arguments are TRL's, which takes seconds to import
            from .train import train

            return train(argv[1:])
        args = make_parser().parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("DLQAT_TRACEBACK"):
            raise
        print(f"dlqat: error: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands but `train`, which has TRL's."""
    parser = argparse.ArgumentParser(
        "dlqat",
        description="Fine-tune a language model inside the low-bit quantizer that it is served with.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dlqat {version('peft-dlqat')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, help: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        own.set_defaults(run=run)
        return own

    commands.add_parser("train", help="fine-tune a model, and export it if told where it will run", add_help=False)
    own = command("export", "write a trained adapter as an engine's file, and check it there", _export)
    own.add_argument("adapter", help="folder or Hub id of the adapter")
    own.add_argument("--to", required=True, choices=sorted(FORMATS), help="format")
    own.add_argument("--output", required=True, type=Path, help="folder to make")
    own.add_argument("--base", help="folder or Hub id of the base model; default: the one that the adapter names")
    own.add_argument("--embeddings", help="dtype of embedding and output head; q8_0 in GGUF")
    own.add_argument("--dtype", help="of all that is not quantized; default: the base model's")
    own.add_argument("--template", help="GGUF file of the same base model, in whose place it goes")
    own.add_argument("--no_verify", action="store_true", help="do not run the engines on it")
    own.add_argument("--overwrite", action="store_true", help="replace an earlier export")

    own = command("verify", "run an exported folder in its engines, and compare with the trained model", _verify)
    own.add_argument("folder", type=Path, help="what `dlqat export` made")
    own.add_argument("--engines", nargs="+", help="only these; default: all that are installed")

    own = command("eval", "measure a model on text (KL, perplexity) or on tasks of lm-eval", _eval)
    own.add_argument("model", help="folder or Hub id of an adapter, or of a model")
    own.add_argument("--teacher", help="model to compare with; default: the adapter's base model")
    own.add_argument("--dataset", help="text: Hub id, file or folder")
    own.add_argument("--dataset_config")
    own.add_argument("--split", help="default: test, of a file train, which is all of it")
    own.add_argument("--text_column", default="text")
    own.add_argument("--length", type=_positive, default=512, help="tokens a block")
    own.add_argument("--blocks", type=_positive, default=64, help="at most so many")
    own.add_argument("--tasks", nargs="+", help="of lm-eval, or mmlu, commonsense")
    own.add_argument("--limit", type=float, help="questions of each task, or below 1 a share")
    own.add_argument("--batch_size", type=_positive, default=1)

    own = command("inspect", "show how each layer of an adapter uses its grid", _inspect)
    own.add_argument("adapter", help="folder or Hub id of the adapter")
    own.add_argument("--png", type=Path, help="draw it, too (needs matplotlib)")

    own = command("plan", "say what a setting makes of a model: size of each file, memory of a step", _plan)
    own.add_argument("model", help="folder or Hub id of the base model")
    own.add_argument("--to", metavar="DESTINATION", help=f"where it will run: {DESTINATIONS}")
    own.add_argument("--bits", type=int)
    own.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of DLQATConfig")
    own.add_argument("--batch_size", type=_positive, default=1, help="sequences a step")
    own.add_argument("--length", type=_positive, default=1024, help="tokens a sequence")
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def _export(args: argparse.Namespace) -> int:
    from ..export import export_model

    result = export_model(
        args.adapter,
        args.output,
        args.to,
        base=args.base,
        embeddings=args.embeddings,
        dtype=args.dtype,
        template=args.template,
        verify=not args.no_verify,
        overwrite=args.overwrite,
    )
    if result is not None:
        print(result)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..export import verify_export

    result = verify_export(args.folder, args.engines)
    print(result)
    return 0 if result.ok else 1


def _eval(args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM

    from ..evaluate import evaluate_model, evaluate_tasks
    from .rows import load_rows, text_blocks

    if not args.dataset and not args.tasks:
        raise ValueError("there is nothing to measure on; give a --dataset of text, or --tasks.")
    model, tokenizer = _load(args.model)
    if args.dataset:
        split = args.split or ("train" if Path(args.dataset).is_file() else "test")
        blocks = text_blocks(
            load_rows(args.dataset, args.dataset_config, split), args.text_column, tokenizer, args.length
        )
        batches = blocks.select(range(min(args.blocks, len(blocks)))).iter(args.batch_size)
        teacher = None
        if args.teacher:
            teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype="auto").to(model.device)
        print(evaluate_model(model, batches, teacher))
    if args.tasks:
        for task, figures in evaluate_tasks(
            model, tokenizer, args.tasks, limit=args.limit, batch_size=args.batch_size
        ).items():
            print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from ..train.report import grid_report

    model, _ = _load(args.adapter)
    report = grid_report(model)
    print(report)
    for problem in report.problems:
        print(f"problem: {problem}")
    if args.png is not None:
        from .picture import draw

        draw(report, args.png)
    return 0


def _plan(args: argparse.Namespace) -> int:
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..large.load_quantized import is_quantized
    from ..large.memory import estimate_memory
    from ..summary import summarize
    from .destination import config_for

    if is_quantized(args.model):
        raise ValueError(
            f"{args.model} is quantized, and is written again with its own types and size; ask estimate_memory in "
            "Python how much its training takes, and train it by `dlqat train`."
        )
    config, _ = config_for(args.to, args.bits, args.set)
    outline = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(outline, dtype=outline.dtype)
    print(summarize(get_peft_model(model, config)))
    print(estimate_memory(config, outline, args.batch_size, args.length))
    return 0


def _load(name: str) -> tuple[Any, Any]:
    """A model, or an adapter on its base model, in the dtype that it was trained in; and its tokenizer."""
    from accelerate import PartialState
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..adapter_file import recorded_dtype

    device = PartialState().device
    try:
        config = PeftConfig.from_pretrained(name)
    except ValueError:  # PEFT's word for a folder without an adapter's config
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
        return model, AutoTokenizer.from_pretrained(name)
    model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=recorded_dtype(name) or "auto").to(device)
    has_tokenizer = (Path(name) / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(name if has_tokenizer else config.base_model_name_or_path)
