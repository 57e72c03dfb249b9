"""`dlqat train`: supervised fine-tuning by TRL, of chat or text, to a file that an engine loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..export import export_model
from ..export.folder import check_free
from ..formats import FORMATS
from ..large.load_quantized import is_quantized, load_quantized, open_quantized
from ..summary import summarize
from ..train.callback import DLQATCallback
from .destination import DESTINATIONS, config_for, config_for_file
from .rows import load_rows

try:
    from trl import SFTConfig, SFTTrainer, TrlParser
except ImportError as error:
    raise ImportError("`dlqat train` trains by TRL: pip install 'peft-dlqat[train]'") from error


_IN_OUTPUT = "OUTPUT/checkpoints"  # until `train` knows where that is


@dataclass
class TrainArguments:
    """What is trained, on what, and where it will run."""

    model: str = field(
        metadata={"help": "Hub id or folder of a causal language model, quantized or not, or a GGUF file."}
    )
    dataset: str = field(
        metadata={
            "help": "Hub id, file (.jsonl, .json, .csv, .parquet, .txt) or folder, with a column `text` or "
            "`messages`, or with `prompt` and `completion`."
        }
    )
    output: str = field(metadata={"help": "Folder for the adapter, the checkpoints and the exported file."})
    to: str | None = field(default=None, metadata={"help": f"Where it will run: {DESTINATIONS}."})
    base: str | None = field(
        default=None, metadata={"help": "Of a GGUF file: hub id or folder of its model's config and tokenizer."}
    )
    bits: int | None = field(default=None, metadata={"help": "Bits of a weight, 2 to 8; or give --to."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="train", metadata={"help": "Split to train on, such as train[:10%%]."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to measure the loss on."})
    r: int = field(default=16, metadata={"help": "Rank, as LoRA's."})
    lora_alpha: int = field(default=16, metadata={"help": "As LoRA's."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model: auto, float32, bfloat16 or float16."})
    set: list[str] = field(
        default_factory=list, metadata={"help": "Other settings of DLQATConfig, NAME=VALUE, such as storage=int4."}
    )


@dataclass
class TrainingSettings(SFTConfig):
    """TRL's, with defaults that go with a low-bit model."""

    output_dir: str | None = field(default=None, metadata={"help": "Of checkpoints; default: OUTPUT/checkpoints."})
    learning_rate: float = field(default=2e-4, metadata={"help": "LoRA's usual one is right here, too."})
    # w_hat is computed in float32 and rounded to the base's dtype: autocast would round it a second time.
    bf16: bool | None = field(default=False, metadata={"help": "Autocast; the base model's own dtype is --dtype."})

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or _IN_OUTPUT
        super().__post_init__()


def train(argv: list[str]) -> int:
    """Fine-tune, save the adapter, and export it.

    Returns:
        The exit status.
    """
    parser = TrlParser(
        [TrainArguments, TrainingSettings],  # type: ignore[arg-type,list-item]
        prog="dlqat train",
        description="Fine-tune a language model on text or chat, and write the file that an engine loads.",
    )
    args, settings = parser.parse_args_and_config(argv)
    in_file = is_quantized(args.model)
    format: str | None
    if in_file:
        format = open_quantized(args.model, args.base).format
        config = config_for_file(format, args.to, args.bits, args.set, r=args.r, lora_alpha=args.lora_alpha)
    else:
        config, format = config_for(args.to, args.bits, args.set, r=args.r, lora_alpha=args.lora_alpha)
    output = Path(args.output)
    if format is not None:  # before hours of training
        FORMATS[format].check_installed()
        check_free(output / format, overwrite=True)
    if settings.push_to_hub:
        raise ValueError("--push_to_hub would push checkpoints; push what comes out: hf upload NAME OUTPUT/adapter.")
    if settings.output_dir == _IN_OUTPUT:
        settings.output_dir = str(output / "checkpoints")

    rows = load_rows(args.dataset, args.dataset_config, args.split)
    held_out = load_rows(args.dataset, args.dataset_config, args.eval_split) if args.eval_split else None
    adapted: Any
    if in_file:
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        adapted, tokenizer = load_quantized(args.model, config, args.base, dtype, PartialState().device)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the model {args.model!r}: {error}") from error
        adapted = get_peft_model(model.to(PartialState().device), config)
    if format is not None and (problem := summarize(adapted, formats=[format]).files[0].problem):
        raise ValueError(problem)
    trainer = SFTTrainer(
        adapted,
        settings,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[DLQATCallback()],
    )
    resume: Any = settings.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": False}.get(str(resume).lower(), resume))
    if held_out is not None:
        print(f"held out: {trainer.evaluate()}")
    trainer.save_model(str(output / "adapter"))  # in all processes, whose shards it may need
    if not trainer.is_world_process_zero():
        return 0
    print(f"adapter: {output / 'adapter'}")
    if format is None:
        return 0
    trained = trainer.accelerator.unwrap_model(trainer.model)
    kept = in_file and format != "gguf"  # a folder has its own tokenizer
    result = export_model(trained, output / format, format, tokenizer=None if kept else tokenizer, overwrite=True)
    print(f"{format}: {output / format}" + ("" if result is None else f"\n{result}"))
    return 0
