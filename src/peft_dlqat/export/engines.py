"""The engines that run exported models: each takes a folder and token ids, and gives logits in float32."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, LlamaConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from .gguf import FILE
from .gguf_model import ARCHITECTURES


@dataclass(frozen=True)
class Engine:
    """A way to run an artefact.

    Attributes:
        module: what must be importable.
        formats: what it runs.
        logits: (folder, format, ids [prompts, tokens]) -> logits [prompts, tokens, vocabulary].
        largest_kl: KL divergence in nats a token up to which it agrees; its own arithmetic is the reason for more
            than 0. None for the same arithmetic as the reference's, of which only the last digits may differ.
    """

    module: str
    formats: tuple[str, ...]
    logits: Callable[[Path, str, torch.Tensor], torch.Tensor]
    largest_kl: float | None

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


@torch.no_grad()
def _transformers(folder: Path, format: str, ids: torch.Tensor) -> torch.Tensor:
    config = AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    if format == "gguf":
        config = _config_beside_gguf(config)
        cls = transformers.AutoModelForCausalLM
        model = cls.from_pretrained(folder, gguf_file=FILE, config=config, dtype=torch.float32)
    else:
        model = cls.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():  # Conv1D's come out of a GGUF transposed, and may round differently so
        parameter.data = parameter.data.contiguous()
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def _config_beside_gguf(config: PretrainedConfig) -> PretrainedConfig:
    """transformers loads GGUF by the names of llama.cpp's architectures, where Mistral is a Llama."""
    if config.model_type != "mistral":
        return config
    content = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "sliding_window")}
    return LlamaConfig.from_dict(content)


def _llama_cpp(folder: Path, format: str, ids: torch.Tensor) -> torch.Tensor:
    from llama_cpp import GGML_TYPE_F32, Llama

    length = ids.shape[1]
    model = Llama(
        str(folder / FILE),
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        type_k=GGML_TYPE_F32,  # it is the weights that are compared, so the cache shall not round
        type_v=GGML_TYPE_F32,
        logits_all=True,
        verbose=False,
    )
    rows = []
    for prompt in ids.tolist():
        model.reset()
        model.eval(prompt)
        rows.append(torch.tensor(model.scores[: len(prompt)].copy()))
    model.close()
    return torch.stack(rows)


def _mlx(folder: Path, format: str, ids: torch.Tensor) -> torch.Tensor:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)  # as the reference: what is stored in 16 bits, and what is computed
    logits = model(mx.array(ids.numpy())).astype(mx.float32)
    return torch.from_numpy(np.array(logits))


@torch.no_grad()
def _gptqmodel(folder: Path, format: str, ids: torch.Tensor) -> torch.Tensor:
    from gptqmodel import BACKEND, GPTQModel

    # float16 fits the scales as they are; its torch kernel then computes in the dtype of its input.
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    return model.model.float().eval()(input_ids=ids, use_cache=False).logits.float()


ENGINES: dict[str, Engine] = {
    "transformers": Engine("transformers", ("dense", "compressed-tensors", "gguf"), _transformers, None),
    "llama-cpp-python": Engine("llama_cpp", ("gguf",), _llama_cpp, 1e-3),
    "mlx-lm": Engine("mlx_lm", ("mlx",), _mlx, 1e-10),
    "gptqmodel": Engine("gptqmodel", ("gptq",), _gptqmodel, 1e-6),
}


def runs(name: str, folder: Path, format: str) -> bool:
    """Whether an engine is there for a format, and knows the model's architecture."""
    engine = ENGINES[name]
    if format not in engine.formats or not engine.installed:
        return False
    if name == "transformers" and format == "gguf":  # its loader lacks some of llama.cpp's architectures
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        return ARCHITECTURES[kind].name in GGUF_SUPPORTED_ARCHITECTURES
    return True
