"""GGUF files of small random models, rounded by llama.cpp, with mixtures of types as files have them."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from peft_dlqat.formats.gguf_metadata import architecture, rope_factors, write_metadata
from peft_dlqat.formats.gguf_vocab import write_vocab

# By GGUF's names of tensors, as regexes; the first that matches says the type. Vectors are F32.
MIXTURES: dict[str, dict[str, str]] = {
    "Q2_K": {"output|attn_output": "Q6_K", "attn_v": "Q4_K", "ffn_down": "Q3_K", "": "Q2_K"},
    "Q3_K_M": {"output|token_embd": "Q6_K", "attn_v": "Q5_K", "ffn_down": "Q4_K", "": "Q3_K"},
    "Q4_K_M": {"output.weight": "Q6_K", r"(attn_v|ffn_down)": "Q6_K", "attn_output": "Q5_0", "": "Q4_K"},
    "Q5_K_S": {"output.weight": "Q6_K", "": "Q5_K"},
    "legacy": {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "ffn_up": "Q5_1", "output": "F16", "": "Q8_0"},
    "Q4_0": {"output|token_embd": "Q6_K", "": "Q4_0"},
    "float": {"attn_q": "BF16", "attn_k": "F32", "attn_v": "IQ4_NL", "ffn_down": "IQ4_XS", "": "Q4_0"},
}


@cache
def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None and spec.origin is not None
    function = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    return function


def quantized(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The bytes of a weight [out, in] in a type, uint8 [out, row_bytes], as llama.cpp rounds it."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weight.shape
    assert columns % block == 0  # or llama.cpp writes past the end
    source = np.ascontiguousarray(weight.float().numpy())
    found = np.zeros((rows, columns // block * size), dtype=np.uint8)
    importance = np.ones(columns, dtype=np.float32)
    written = _library()(
        int(number),
        ctypes.c_void_p(source.ctypes.data),
        ctypes.c_void_p(found.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(importance.ctypes.data),
    )
    assert written == found.nbytes
    return torch.from_numpy(found)


@torch.no_grad()
def write_gguf(
    model: PreTrainedModel,
    path: Path,
    mixture: str,
    tokenizer: Any = None,
    changed: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter and quantizer would.

    Args:
        model: of an architecture that this package writes.
        path: the file.
        mixture: a key of `MIXTURES`, or the name of a type for all.
        tokenizer: whose vocabulary goes into the file.
        changed: by GGUF's names of tensors, what is made of their bytes.
    """
    config, arch = model.config, architecture(model.config)
    state = {name: value for name, value in model.state_dict().items() if not _is_tied(model, name)}
    names = arch.tensor_names(config, list(state))
    with closing(gguf.GGUFWriter(path=str(path), arch=arch.name)) as writer:
        write_metadata(writer, config, arch, "small")
        writer.add_string("general.of_nobody", "kept as it is")
        if tokenizer is not None:
            folder = path.parent / "tokenizer"
            tokenizer.save_pretrained(folder)
            write_vocab(writer, folder, config)
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        for name, value in state.items():
            rows = value[arch.row_order(name, config, value.shape[0])]
            rows = arch.adjusted(name, rows).contiguous()
            kind = "F32" if value.dim() == 1 else type_of(names[name], mixture)
            if kind in ("F32", "F16"):
                writer.add_tensor(names[name], rows.numpy().astype(np.float32 if kind == "F32" else np.float16))
                continue
            number = gguf.GGMLQuantizationType[kind]
            found = rows.to(torch.bfloat16).view(torch.uint8) if kind == "BF16" else quantized(rows, kind)
            if changed is not None and names[name] in changed:
                found = changed[names[name]](found)
            writer.add_tensor(names[name], found.numpy(), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


@torch.no_grad()
def write_experts(model: PreTrainedModel, path: Path, without: str = "none") -> Path:
    """Write a Qwen3-MoE, whose stacked experts a file holds as gate and up, apart; all in Q4_K and Q6_K.

    Args:
        model: the model.
        path: the file.
        without: a part of the names of tensors that are left out.
    """
    config = model.config
    head_dim = config.head_dim
    with closing(gguf.GGUFWriter(path=str(path), arch="qwen3moe")) as writer:
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("none")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
        for name, value in model.state_dict().items():
            block = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
            if name.endswith("experts.gate_up_proj"):
                gate, up = value.chunk(2, 1)
                parts = {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
            elif name.endswith("experts.down_proj"):
                parts = {f"{block}.ffn_down_exps.weight": value}
            else:
                parts = {names.get_name(name, try_suffixes=(".weight",)): value}
            for known, part in parts.items():
                if without in known:
                    continue
                kind = "F32" if part.dim() == 1 or "gate_inp" in known else "Q6_K" if "down" in known else "Q4_K"
                if kind == "F32":
                    writer.add_tensor(known, part.numpy())
                    continue
                found = quantized(part.flatten(0, -2), kind).unflatten(0, part.shape[:-1])
                writer.add_tensor(known, found.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def type_of(name: str, mixture: str) -> str:
    """The type that a mixture has for a tensor of GGUF's name."""
    return next(kind for key, kind in MIXTURES.get(mixture, {"": mixture}).items() if re.search(key, name))


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    head = model.get_output_embeddings()
    return name == "lm_head.weight" and head.weight is model.get_input_embeddings().weight
