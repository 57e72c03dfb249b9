"""Whether GGUF, as llama.cpp reads it, says all that a model's config says.

Each field that the config's class declares is written (`gguf_metadata`), or changes no logit, or has the value that
llama.cpp assumes; else it is refused by its name.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..messages import shown
from .gguf_metadata import Architecture, architecture, rope_factors, rope_of, write_metadata

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .gguf_file import GGUFFile

_WRITTEN = {
    *("vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "num_hidden_layers", "n_layer"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "original_max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "final_logit_softcapping"),
}
# By the tensors that there are.
_BY_TENSORS = {"tie_word_embeddings", "attention_bias", "mlp_bias"}
# Checked below.
_CHECKED = {"rope_parameters", "sliding_window", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping"}
# From which `layer_types` is made.
_WINDOWS = {"use_sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
_TRAINING = {
    *("initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "pretraining_tp"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
}
# The same numbers in another order, or what is returned beside the logits.
_RUNNING = {
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    *("reorder_and_upcast_attn", "id2label", "label2id", "num_labels", "problem_type", "dtype", "torch_dtype"),
}
_NAMES = {"architectures", "model_type", "transformers_version", "_name_or_path", "auto_map", "is_encoder_decoder"}
# What some versions of transformers keep beside what they declare; the first is checked, the second is RoPE's too.
_ELSEWHERE = {"head_dim", "partial_rotary_factor", "ignore_keys_at_rope_validation"}
_KNOWN = _WRITTEN | _BY_TENSORS | _CHECKED | _WINDOWS | _TRAINING | _RUNNING | _NAMES
_ROPE = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    *("low_freq_factor", "high_freq_factor"),
}

# Keys that change the model where only one side has them.
_SAID = ("rope.scaling.", "softcapping", "sliding_window")
# Keys that do not: how long a text may be, and a remark.
_APART = {"context_length", "rope.scaling.finetuned"}
# What the file and the config must agree on, beside all weights: by the file's key, the config's fields.
_KEYS = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
}
_NO_SCALING = ("default", "llama3", "longrope")  # those whose factors are tensors, beside it
# Values that say as much as no key.
_NOTHING: tuple[Any, ...] = ("none", 0)


def check_config(config: PretrainedConfig) -> None:
    """Refuse a config that GGUF cannot say; warn of keys that its class does not declare.

    Raises:
        ValueError: naming the field, its value, what llama.cpp assumes, and what to do.
    """
    arch = architecture(config)
    ours = type(config).__module__.startswith("transformers.")
    declared = _declared(type(config))
    for name, accepted in arch.assumed.items():
        if getattr(config, name, accepted[0]) not in accepted:
            raise _cannot(name, getattr(config, name), f"llama.cpp takes it for {accepted[0]!r}")
    for name in sorted(declared - _KNOWN - set(arch.assumed)):
        value = getattr(config, name, None)
        if not ours or value != getattr(type(config)(), name, None):
            raise _cannot(name, value, "it is not known here what llama.cpp makes of it")
    _check_sizes(config, arch)
    for name, rope in _ropes(config):
        _check_rope(name, rope, arch)
    if arch.name in ("gemma2", "gemma3"):
        _check_gemma(config, arch)
    if "sliding_window" in declared:
        _check_windows(config, arch)
    without_effect = _RUNNING | _NAMES | (_WINDOWS if "layer_types" in declared else set())
    unknown = sorted(set(config.to_dict()) - declared - without_effect - _ELSEWHERE) + _unknown_rope(config)
    if unknown and not ours:
        value = getattr(config, unknown[0], None)
        raise _cannot(unknown[0], value, f"{type(config).__name__} is not transformers' own, and does not declare it")
    if unknown:
        warnings.warn(
            f"{type(config).__name__} does not declare {', '.join(unknown)}, and the GGUF file holds nothing of it; "
            "have an engine compare the logits if it changes the model.",
            stacklevel=5,
        )


def check_basics(file: GGUFFile, config: PretrainedConfig) -> list[str]:
    """Refuse a config of any architecture whose sizes, epsilon or RoPE are not a file's: what tensors don't show.

    Returns:
        The file's tensors that are no weights.

    Raises:
        ValueError: saying only what differs.
    """
    text = config.get_text_config()
    wanted: dict[str, Any] = {
        key: next((value for name in names if (value := getattr(text, name, None)) is not None), None)
        for key, names in _KEYS.items()
    }
    rope = rope_of(text)
    kind = rope.get("rope_type", "default")
    scaling = {"rope.scaling.type": "none" if kind in _NO_SCALING else kind}
    wanted |= {"rope.freq_base": rope.get("rope_theta")}
    wanted |= scaling | ({"rope.scaling.factor": rope.get("factor")} if kind not in _NO_SCALING else {})
    for key, value in wanted.items():
        found = file.metadata.get(f"{file.architecture}.{key}", "none" if key in scaling else None)
        if kind == "longrope" and key in scaling:
            continue  # told by its tensors
        if value is not None and isinstance(found, int | float | str) and not _agree(found, value):
            raise ValueError(f"it says {key}={shown(found)}, and the config {shown(value)}")
    factors = {
        "rope_freqs.weight": rope_factors(text),
        "rope_factors_long.weight": rope.get("long_factor"),
        "rope_factors_short.weight": rope.get("short_factor"),
    }
    for name, values in factors.items():
        if (values is None) != (name not in file.tensors):
            raise ValueError(f"RoPE is scaled by {kind!r} in the config, and {name} is for another kind")
        if values is not None and not np.allclose(file.decode(name), np.asarray(values, np.float32), rtol=1e-5):
            raise ValueError(f"its {name} does not hold the config's factors")
    return [name for name in factors if name in file.tensors]


def _agree(found: float | str, value: Any) -> bool:
    return found == value if isinstance(found, str) else math.isclose(found, value, rel_tol=1e-6)


def check_metadata(metadata: Mapping[str, Any], factors: np.ndarray | None, config: PretrainedConfig) -> None:
    """Refuse a config that does not say what a file's metadata say: one model would be trained for another.

    Args:
        metadata: the file's keys and values.
        factors: by which the file divides RoPE's frequencies, if it has some.
        config: of an architecture of `gguf_metadata`.

    Raises:
        ValueError: naming the key, the file's value and the config's.
    """
    import gguf

    arch = architecture(config)
    if arch.name != metadata.get("general.architecture"):
        raise ValueError(f"general.architecture is {metadata.get('general.architecture')!r}, not {arch.name!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields without a key, for whoever writes a file
        check_config(config)
    with closing(gguf.GGUFWriter(path=None, arch=arch.name)) as writer:
        write_metadata(writer, config, arch, "")
        wanted = {key: entry.value for key, entry in writer.kv_data[0].items() if entry.value not in _NOTHING}
    found = {key: value for key, value in metadata.items() if value not in _NOTHING}
    for key in sorted({key for key in wanted.keys() | found.keys() if key.startswith(f"{arch.name}.")}):
        in_both = key in wanted and key in found
        name = key.removeprefix(f"{arch.name}.")
        if name in _APART or not (in_both or name.startswith(_SAID) or name.endswith(_SAID)):
            continue
        if not _same(found.get(key), wanted.get(key)):
            raise ValueError(f"{key} is {shown(found.get(key))}, and the config makes it {shown(wanted.get(key))}")
    expected = rope_factors(config)
    if (factors is None) != (expected is None) or not np.allclose(
        1.0 if factors is None else factors, 1.0 if expected is None else expected, rtol=1e-4
    ):
        raise ValueError("rope_freqs.weight is not what the config's rope_parameters make")


def _same(found: Any, wanted: Any) -> bool:
    """Whether a key has one value; files keep float32."""
    if isinstance(found, float) and isinstance(wanted, float | int):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def _declared(cls: type) -> set[str]:
    """Fields of a config's class and its parents."""
    names = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    for parent in cls.__mro__:
        if "__init__" in vars(parent):
            names |= set(inspect.signature(vars(parent)["__init__"]).parameters)
    return names - {"self", "args", "kwargs"}


def _check_sizes(config: PretrainedConfig, arch: Architecture) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise _cannot("is_encoder_decoder", True, "llama.cpp takes this architecture for a decoder")
    usual = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or usual
    if head_dim != usual and not arch.any_head_dim:
        raise _cannot("head_dim", head_dim, f"llama.cpp takes hidden_size / num_attention_heads = {usual} for it")


def _check_windows(config: PretrainedConfig, arch: Architecture) -> None:
    """Refuse a window where llama.cpp has none, unless no text of the model's length is longer."""
    window = config.sliding_window
    kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if window else [])
    if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise _cannot("layer_types", other[0], "llama.cpp has no such layer in this architecture")
    if arch.windows:
        # Versions up to the summer of 2026 take this pattern, whatever the file says.
        every = arch.windows
        usual = [f"{'sliding' if index % every else 'full'}_attention" for index in range(1, len(kinds) + 1)]
        if kinds != usual or "full_attention" not in kinds:
            raise _cannot(
                "layer_types", kinds, f"llama.cpp gives all layers a window, but for one in {every}, the last"
            )
    elif window and "sliding_attention" in kinds and window < config.max_position_embeddings:
        raise _cannot(
            "sliding_window",
            window,
            "llama.cpp has no window for this architecture; set model.config.max_position_embeddings = "
            f"{window} for a file of so many tokens, which need none, or",
        )


def _ropes(config: PretrainedConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """RoPE's parameters by the name of what holds them; several where each kind of layer has its own."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope_of(config) is rope:
        yield "rope_parameters", rope
    else:
        yield from ((f"rope_parameters[{kind!r}]", own) for kind, own in rope.items() if isinstance(own, dict))


def _check_rope(name: str, rope: dict[str, Any], arch: Architecture) -> None:
    kind = rope.get("rope_type", "default")
    known = arch.rope_types if "sliding" not in name else ("default",)
    if kind not in known:
        raise _cannot(f"{name}.rope_type", kind, f"llama.cpp has only {', '.join(map(repr, known))} here")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not arch.partial_rotary:
        raise _cannot(
            f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], "llama.cpp rotates whole heads here"
        )
    if kind == "yarn":
        for key, assumed in {"beta_fast": 32, "beta_slow": 1, "truncate": True}.items():
            if rope.get(key) not in (None, assumed):
                raise _cannot(f"{name}.{key}", rope[key], f"llama.cpp takes {assumed} for it")


def _unknown_rope(config: PretrainedConfig) -> list[str]:
    return [f"{name}.{key}" for name, rope in _ropes(config) for key in sorted(set(rope) - _ROPE)]


def _check_gemma(config: PretrainedConfig, arch: Architecture) -> None:
    """llama.cpp has no key for how Gemma 2 and 3 scale their queries: it tells the 27B by its number of layers."""
    heads, layers_of_27b = config.num_attention_heads, 46 if arch.name == "gemma2" else 62
    scalar = config.hidden_size // heads if config.num_hidden_layers == layers_of_27b else config.head_dim
    if config.query_pre_attn_scalar != scalar:
        raise _cannot(
            "query_pre_attn_scalar",
            config.query_pre_attn_scalar,
            f"llama.cpp takes {scalar} for a model of these sizes",
        )
    if arch.name == "gemma2" and getattr(config, "_attn_implementation", None) == "sdpa":  # newer versions refuse it
        rule = "transformers then caps no attention logits, llama.cpp does; train with attn_implementation='eager', or"
        raise _cannot("attn_implementation", "sdpa", rule)
    for name in ("attn_logit_softcapping", "final_logit_softcapping") if arch.name == "gemma2" else ():
        if not getattr(config, name):
            raise _cannot(name, getattr(config, name), "llama.cpp always caps this architecture's logits")


def _cannot(name: str, value: Any, rule: str) -> ValueError:
    rule = rule if rule.endswith(" or") else f"{rule};"
    return ValueError(
        f"{name}={value!r} cannot be written as GGUF: {rule} export the model as 'compressed-tensors' or 'dense'."
    )
