"""Small models of the shapes that engines know, with a trained adapter, for the tests of exports."""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import perturb, random_model, say_calibrated
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from peft_dlqat import DLQATConfig
from peft_dlqat.export.verify import Verification
from peft_dlqat.formats import FORMATS
from peft_dlqat.quant.grid import Grid

EMBEDDED = Path(__file__).parents[1] / "examples" / "embedded" / "model"
VOCAB, HIDDEN = 96, 256  # a multiple of 256, the block of GGUF's smallest types
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GEMMA = {**SHAPE, "tie_word_embeddings": True, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
# One layer in six without a window; narrow, for the sake of time.
GEMMA3 = {
    **{**GEMMA, "num_hidden_layers": 7, "hidden_size": 64, "intermediate_size": 128},
    **{"head_dim": 16, "query_pre_attn_scalar": 16, "rope_parameters": GEMMA3_ROPE},
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "tied": lambda: LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}),
    "mistral": lambda: MistralConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=64),
    "gemma": lambda: GemmaConfig(**{**SHAPE, "tie_word_embeddings": True}, head_dim=64),  # as all Gemmas
    # Windows shorter than the prompts, and layers of both kinds.
    "gemma2": lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA3),
    "phi": lambda: PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "phi3": lambda: Phi3Config(**SHAPE, pad_token_id=0),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


@cache
def _base(kind: str) -> PreTrainedModel:
    return random_model(CONFIGS[kind]())


def base_model(kind: str = "llama") -> PreTrainedModel:
    """A random model in float32; "embedded" for the pretrained one of examples/."""
    if kind == "embedded":
        return AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    return copy.deepcopy(_base(kind))


def adapted(
    kind: str = "llama",
    trained: bool = True,
    dtype: torch.dtype | None = None,
    shape: dict[str, int] | None = None,
    **settings: Any,
) -> PeftModel:
    """The model with an adapter that has been moved, as training would, and says that it was calibrated.

    `shape` changes a Llama's config.
    """
    config = DLQATConfig(**{"init": "minmax", "task_type": "CAUSAL_LM", "group_size": 32, **settings})
    base = random_model(LlamaConfig(**SHAPE | shape)) if shape else base_model(kind)
    model = get_peft_model(base.to(dtype), config)
    if trained:
        perturb(model)
        say_calibrated(model)
    return model.eval()


@torch.no_grad()
def merged_logits(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the merged model in float32; leaves the model as it was."""
    merged = copy.deepcopy(model).float().merge_and_unload()
    return merged(input_ids=ids, use_cache=False).logits


def save_base(kind: str, folder: Path, **settings: Any) -> Path:
    """The base model of `adapted` on disk."""
    base_model(kind).save_pretrained(folder, **settings)
    return folder


def llama2_tokenizer(size: int = 1000) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with bytes for what is unknown, as transformers has Llama 2's."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    trained.train([str(Path(__file__).parents[1] / "LICENSE")], trainer)
    content = json.loads(trained.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# What runs each format here; GPTQ's engine is not among those of the test environment.
ENGINE_MODULES = {"compressed-tensors": "compressed_tensors", "gguf": "gguf", "mlx": "mlx_lm", "dense": "torch"}
# Largest KL divergence by which an engine's own arithmetic may differ, where it is not the reference's.
LARGEST_KL = {"mlx": 1e-10}


def needs(format: str) -> None:
    """Skip the test where the format cannot be written and run."""
    pytest.importorskip(ENGINE_MODULES[format])


def held_grids(format: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Settings of all grids with some group sizes that a format holds."""
    settings = [
        {"bits": bits, "group_size": size, "zero_point": zero_point}
        for bits, size, zero_point in itertools.product((2, 3, 4, 8), sizes, ("none", "integer", "float"))
    ]
    return [setting for setting in settings if FORMATS[format].holds(Grid(**setting, scale_dtype=torch.bfloat16))]


def held(format: str, size: int, dtype: torch.dtype) -> set[tuple[int, str]]:
    """Bits and kinds of zero of all grids of a group size and dtype of scales that a format holds."""
    grids = itertools.product(range(2, 9), ("none", "integer", "float"))
    return {(bits, zero) for bits, zero in grids if FORMATS[format].holds(Grid(bits, size, zero, dtype))}


def as_id(setting: dict[str, Any]) -> str:
    """A test's id."""
    return "-".join(str(value) for value in setting.values())


@torch.no_grad()
def exported_logits(folder: Path, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Logits of an exported folder as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    return model(input_ids=ids, use_cache=False).logits


def assert_same(found: Verification | None, format: str) -> None:
    """What `verify_export` found is the trained model."""
    assert found is not None and found.ok, str(found)
    (figures,) = (row for row in found.figures if row.engine in ("transformers", "mlx-lm"))
    if format in LARGEST_KL:
        assert figures.kl <= LARGEST_KL[format] and figures.top1 == 1.0
    else:
        assert figures.max_difference == 0.0 and figures.kl == 0.0
