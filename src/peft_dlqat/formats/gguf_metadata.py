"""What GGUF says about a model: its architecture's metadata, tensor names, and the order of rows.

The keys are those of llama.cpp's loader; names come from the `gguf` package's own map.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_QK = re.compile(r"self_attn\.([qk])_proj\.(weight|bias)$")
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp names and stores one kind of model.

    Attributes:
        name: its name in GGUF.
        permuted: whether rows of q and k go from transformers' halves (RoPE pairs i, i + n/2) to pairs side by side.
        norm_offset: added to the weights of norms: gemma's are stored less one.
        layer_norm: whether norms subtract the mean, and so have another key for epsilon.
        extra: further metadata.
    """

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    layer_norm: bool = False
    extra: Callable[[Any, PretrainedConfig], None] | None = None

    def tensor_names(self, config: PretrainedConfig, tensors: list[str]) -> dict[str, str]:
        """GGUF's name of each of the model's tensors.

        Raises:
            ValueError: for a tensor that gguf's map does not have in this architecture.
        """
        import gguf

        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.name)
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
        unknown = [name for name, known in found.items() if known is None]
        if unknown:
            raise ValueError(
                f"GGUF's architecture {self.name!r} has no place for {len(unknown)} of the model's tensors: "
                f"{', '.join(unknown[:5])}; export it as 'compressed-tensors', 'mlx' or 'dense'."
            )
        return {name: known for name, known in found.items() if known is not None}

    def row_order(self, name: str, config: PretrainedConfig, rows: int) -> torch.Tensor | slice:
        """Which of transformers' rows stands where in the file."""
        match = _QK.search(name) if self.permuted else None
        if match is None:
            return slice(None)
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()

    def adjusted(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A dense tensor as the file has it."""
        return value.float() + self.norm_offset if self.norm_offset and name.endswith("norm.weight") else value

    def notes(self, config: PretrainedConfig) -> list[str]:
        """What the file cannot say."""
        window = getattr(config, "sliding_window", None)
        if self.name == "llama" and window:
            return [f"llama.cpp has no sliding window for this architecture: the same logits up to {window} tokens"]
        return []


def _gemma(writer: Any, config: PretrainedConfig) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _windows(writer: Any, config: PretrainedConfig) -> None:
    if "sliding_attention" not in config.layer_types:
        raise _cannot(config, "layer_types", "llama.cpp wants a layer with a window in this architecture")
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma2(writer: Any, config: PretrainedConfig) -> None:
    _refuse_other_queries(config, layers_of_27b=46)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, name):
            raise _cannot(config, name, "llama.cpp always caps this architecture's logits")
    _gemma(writer, config)
    _windows(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)


def _gemma3(writer: Any, config: PretrainedConfig) -> None:
    _refuse_other_queries(config, layers_of_27b=62)
    if config.attn_logit_softcapping:
        raise _cannot(config, "attn_logit_softcapping", "llama.cpp has none for this architecture")
    whole, window = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    if whole["rope_type"] not in ("default", "linear") or window["rope_type"] != "default":
        raise _cannot(config, "rope_parameters", "only full attention can be scaled, and only by 'linear'")
    _gemma(writer, config)
    _windows(writer, config)
    writer.add_rope_freq_base_swa(window["rope_theta"])


def _refuse_other_queries(config: PretrainedConfig, layers_of_27b: int) -> None:
    """llama.cpp has no key for how queries are scaled and masked: it tells the 27B by its number of layers."""
    heads = config.num_attention_heads
    scalar = config.hidden_size // heads if config.num_hidden_layers == layers_of_27b else config.head_dim
    if config.query_pre_attn_scalar != scalar:
        raise _cannot(config, "query_pre_attn_scalar", f"llama.cpp takes {scalar} for a model of these sizes")
    if config.use_bidirectional_attention:
        raise _cannot(config, "use_bidirectional_attention", "llama.cpp's attention is causal")


def _cannot(config: PretrainedConfig, name: str, rule: str) -> ValueError:
    return ValueError(
        f"{name}={getattr(config, name)!r} cannot be written as GGUF: {rule}; export the model as "
        "'compressed-tensors' or 'dense'."
    )


def _phi3(writer: Any, config: PretrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window or 0)


# By transformers' model_type.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", extra=_gemma),
    "gemma": Architecture("gemma", norm_offset=1.0, extra=_gemma),
    "gemma2": Architecture("gemma2", norm_offset=1.0, extra=_gemma2),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, extra=_gemma3),
    "gpt2": Architecture("gpt2", layer_norm=True),
    "phi": Architecture("phi2", layer_norm=True),
    "phi3": Architecture("phi3", extra=_phi3),
}


def architecture(config: PretrainedConfig) -> Architecture:
    """The architecture of a config.

    Raises:
        ValueError: for a kind of model that is not known here.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type={kind!r} cannot be written as GGUF, only {', '.join(map(repr, ARCHITECTURES))}; export it as "
            "'compressed-tensors' or 'dense'."
        )
    return ARCHITECTURES[kind]


def write_metadata(writer: Any, config: PretrainedConfig, arch: Architecture, name: str) -> None:
    """Write the sizes and constants that llama.cpp's loader reads."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_vocab_size(config.vocab_size)
    if arch.layer_norm:
        epsilon = getattr(config, "layer_norm_epsilon", None) or getattr(config, "layer_norm_eps", 1e-5)
        writer.add_layer_norm_eps(epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch.name == "llama" and head_dim != hidden // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # gemma3 has one base for each kind of layer
    if rope:
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
        _write_rope_scaling(writer, rope)
    if arch.extra is not None:
        arch.extra(writer, config)


def _write_rope_scaling(writer: Any, rope: dict[str, Any]) -> None:
    import gguf

    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3 is a tensor of factors
        return
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    else:
        raise ValueError(
            f"rope_type={kind!r} cannot be written as GGUF here, only 'default', 'linear', 'llama3' and 'yarn'; "
            "export the model as 'compressed-tensors' or 'dense'."
        )


def rope_factors(config: PretrainedConfig) -> np.ndarray | None:
    """By how much llama3's scaling divides each frequency, float32 [head_dim / 2]; None without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = 2 * len(scaled)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    return (plain / scaled).float().numpy()
