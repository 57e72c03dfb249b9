"""What GGUF says about a model: its architecture's metadata, tensor names, and the order of rows.

The keys are those of llama.cpp's loader; names come from the `gguf` package's own map. `gguf_checks` refuses what they
cannot say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
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
        assumed: by the config's field, the values that llama.cpp takes for granted.
        partial_rotary: whether a part of each head may be left without RoPE.
        any_head_dim: whether heads may be wider or narrower than hidden_size / num_attention_heads.
        windows: of so many layers one has no sliding window; 0 where none has one.
        rope_types: kinds of RoPE.
        extra: further metadata.
    """

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    layer_norm: bool = False
    assumed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    partial_rotary: bool = False
    any_head_dim: bool = False
    windows: int = 0
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
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


def _windows(writer: Any, config: PretrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma2(writer: Any, config: PretrainedConfig) -> None:
    _windows(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)


def _gemma3(writer: Any, config: PretrainedConfig) -> None:
    _windows(writer, config)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _phi3(writer: Any, config: PretrainedConfig) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(0)  # so that no version takes one of its own


_SILU = ("silu", "swish")
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_GEMMA = {"attention_bias": (False,), "use_bidirectional_attention": (False, None), "tie_word_embeddings": (True,)}
_LLAMA = Architecture(
    "llama",
    permuted=True,
    assumed={"hidden_act": _SILU},
    any_head_dim=True,
    rope_types=("default", "linear", "yarn", "llama3"),
)

# By transformers' model_type.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", assumed={"hidden_act": _SILU}),
    "qwen3": Architecture("qwen3", assumed={"hidden_act": _SILU, "attention_bias": (False,)}, any_head_dim=True),
    "gemma": Architecture("gemma", norm_offset=1.0, assumed={"hidden_act": _TANH_GELU, **_GEMMA}, any_head_dim=True),
    "gemma2": Architecture(
        "gemma2",
        norm_offset=1.0,
        assumed={"hidden_activation": _TANH_GELU, **_GEMMA},
        any_head_dim=True,
        windows=2,
        extra=_gemma2,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        norm_offset=1.0,
        assumed={"hidden_activation": _TANH_GELU, "attn_logit_softcapping": (None,), **_GEMMA},
        any_head_dim=True,
        windows=6,
        rope_types=("default", "linear"),
        extra=_gemma3,
    ),
    "gpt2": Architecture(
        "gpt2",
        layer_norm=True,
        assumed={
            "activation_function": _TANH_GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "phi": Architecture(
        "phi2",
        layer_norm=True,
        assumed={"hidden_act": _TANH_GELU, "qk_layernorm": (False,), "tie_word_embeddings": (False,)},
        partial_rotary=True,
    ),
    "phi3": Architecture(
        "phi3", assumed={"hidden_act": _SILU}, partial_rotary=True, rope_types=("default",), extra=_phi3
    ),
}


def architecture(config: PretrainedConfig) -> Architecture:
    """The architecture of a config.

    Raises:
        ValueError: for a kind of model that is not known here.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type={kind!r} cannot be written as GGUF, only {', '.join(map(repr, ARCHITECTURES))}; give a file "
            "that llama.cpp's converter made of the base model by template=..., or export it as 'compressed-tensors' "
            "or 'dense'."
        )
    return ARCHITECTURES[kind]


def write_metadata(writer: Any, config: PretrainedConfig, arch: Architecture, name: str) -> None:
    """Write the sizes and constants that llama.cpp's loader reads, of a config that `gguf_checks` has passed."""
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
    if arch.any_head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = rope_of(config)
    if rope:
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
        _write_rope_scaling(writer, config, rope)
    if arch.extra is not None:
        arch.extra(writer, config)


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """RoPE's parameters, those of full attention where each kind of layer has its own; empty without RoPE."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def _write_rope_scaling(writer: Any, config: PretrainedConfig, rope: dict[str, Any]) -> None:
    """The scaling of all kinds but llama3, which is a tensor of factors."""
    import gguf

    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        original = rope["original_max_position_embeddings"]
        factor = rope["factor"] or config.max_position_embeddings / original
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(original)
        # llama.cpp multiplies its own attention factor, the paper's, by this one.
        _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        of_paper = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        if attention_factor != of_paper:
            writer.add_rope_scaling_attn_factors(attention_factor / of_paper)


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
