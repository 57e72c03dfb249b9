"""TRL's trainers on tiny models and data made on the spot."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import torch
import trl
from conftest import CONFIGS, lm_batches, perturb, tiny_model, tokens
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification, TrainerCallback

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from word_tokenizer import WORDS, word_tokenizer

from peft_dlqat import DLQATCallback, DLQATConfig, calibrate

TRAINERS: dict[str, tuple[Any, Any]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}


def _text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def data(kind: str) -> Dataset:
    """16 rows, as the trainer wants them."""
    if kind == "sft":
        return Dataset.from_list([{"text": _text(i, 12)} for i in range(16)])
    prompts = [{"prompt": _text(i, 4) + " "} for i in range(16)]
    if kind == "grpo":
        return Dataset.from_list(prompts)
    if kind == "kto":
        rows = [{**row, "completion": _text(100 + i, 5), "label": bool(i % 2)} for i, row in enumerate(prompts)]
        return Dataset.from_list(rows)
    return Dataset.from_list(
        [{**row, "chosen": _text(100 + i, 5 + i % 3), "rejected": _text(200 + i, 6)} for i, row in enumerate(prompts)]
    )


def base(kind: str) -> nn.Module:
    """A language model; for a reward one with a head of one number."""
    if kind != "reward":
        return tiny_model()
    config = CONFIGS["llama"]()
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).eval()


def adapter(kind: str, **settings: Any) -> DLQATConfig:
    """A config whose rounding is felt."""
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    return DLQATConfig(**{"bits": 2, "group_size": 32, "r": 4, "task_type": task, **settings})


def adapted(kind: str, trained: bool, **settings: Any) -> PeftModel:
    """The base model with a fresh adapter, or one that was calibrated and trained."""
    torch.manual_seed(0)
    model = get_peft_model(base(kind), adapter(kind, **settings))
    if trained:
        calibrate(model, [{"input_ids": batch["input_ids"]} for batch in lm_batches(2)], progress=False)
        perturb(model)
    return model


def trainer(kind: str, model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    """Of two steps of four rows; `options` are of its arguments, but for `peft_config`."""
    cls, arguments = TRAINERS[kind]
    more = {name: options.pop(name) for name in ("peft_config",) if name in options}
    if kind == "grpo":
        options = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, **options}
        more["reward_funcs"] = lambda completions, **_: [float(text.count("w1")) for text in completions]
    options = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "learning_rate": 2e-4,
        **options,
    }
    return cls(
        model,
        args=arguments(**options),
        train_dataset=data(kind),
        processing_class=word_tokenizer(),
        callbacks=[DLQATCallback(), *callbacks],
        **more,
    )


def losses(run: Any) -> list[float]:
    """Those of its steps."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    """Logits in eval mode; the model's modes are left as they were."""
    ids = tokens(4, 8)
    clone = copy.deepcopy(model).eval()
    return clone(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


class Start(TrainerCallback):
    """Remembers the model as the first step found it: after what DLQATCallback does."""

    model: Any = None
    outputs: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.model, self.outputs = copy.deepcopy(model), outputs(model)
