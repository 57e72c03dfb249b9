"""Each field of a config is written, or changes nothing, or is as llama.cpp assumes; else it is refused by name."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
from export_models import CONFIGS, GEMMA, GEMMA3, GEMMA3_ROPE, SHAPE, adapted
from refusals import refused
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from peft_dlqat import export_model
from peft_dlqat.formats import gguf_checks
from peft_dlqat.formats.gguf_checks import check_basics, check_config
from peft_dlqat.formats.gguf_metadata import ARCHITECTURES

TIED = {**SHAPE, "tie_word_embeddings": True}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
OVERLAP = {**GEMMA3_ROPE, "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}


def llama(**settings):
    return LlamaConfig(**{**SHAPE, **settings})


def rope(**settings):
    return llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4, **settings})


def gemma2(**settings):
    return Gemma2Config(**{**GEMMA, **CAPS, **settings})


def gemma3(**settings):
    return Gemma3TextConfig(**{**GEMMA3, **settings})


def gpt2(**settings):
    return GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, **settings)


REFUSED = {
    "hidden_act='gelu'": [lambda: llama(hidden_act="gelu"), lambda: Phi3Config(hidden_act="gelu", pad_token_id=0)],
    "hidden_act='relu'": [
        lambda: MistralConfig(hidden_act="relu"),
        lambda: Qwen2Config(hidden_act="relu"),
        lambda: Qwen3Config(hidden_act="relu"),
        lambda: GemmaConfig(hidden_act="relu"),
        lambda: PhiConfig(hidden_act="relu"),
    ],
    "hidden_activation='silu'": [lambda: gemma2(hidden_activation="silu"), lambda: gemma3(hidden_activation="silu")],
    "activation_function='relu'": [lambda: gpt2(activation_function="relu")],
    "scale_attn_weights=False": [lambda: gpt2(scale_attn_weights=False)],
    "scale_attn_by_inverse_layer_idx=True": [lambda: gpt2(scale_attn_by_inverse_layer_idx=True)],
    "add_cross_attention=True": [lambda: gpt2(add_cross_attention=True)],
    "is_encoder_decoder=True": [lambda: llama(is_encoder_decoder=True)],
    "attention_bias=True": [
        lambda: Qwen3Config(attention_bias=True),
        lambda: GemmaConfig(attention_bias=True),
        lambda: gemma2(attention_bias=True),
        lambda: gemma3(attention_bias=True),
    ],
    "use_bidirectional_attention=True": [lambda: gemma3(use_bidirectional_attention=True)],
    "tie_word_embeddings=False": [lambda: GemmaConfig(tie_word_embeddings=False)],
    "tie_word_embeddings=True": [lambda: PhiConfig(tie_word_embeddings=True)],
    "qk_layernorm=True": [lambda: PhiConfig(qk_layernorm=True)],
    "head_dim=32": [lambda: Qwen2Config(**SHAPE, head_dim=32), lambda: Phi3Config(**SHAPE, head_dim=32)],
    "query_pre_attn_scalar=256": [
        lambda: gemma2(query_pre_attn_scalar=256),
        lambda: gemma3(query_pre_attn_scalar=256),
    ],
    "attn_logit_softcapping=None": [lambda: gemma2(attn_logit_softcapping=None)],
    "attn_logit_softcapping=50.0": [lambda: gemma3(attn_logit_softcapping=50.0)],
    "final_logit_softcapping=None": [lambda: gemma2(final_logit_softcapping=None)],
    "layer_types=['full_attention', 'sliding_attention']": [
        lambda: gemma2(layer_types=["full_attention", "sliding_attention"]),
        lambda: gemma3(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]),
    ],
    "layer_types=['sliding_attention', 'sliding_attention']": [
        lambda: gemma2(layer_types=["sliding_attention"] * 2),
        lambda: gemma3(num_hidden_layers=2),
    ],
    "layer_types='chunked_attention'": [
        lambda: gemma3(num_hidden_layers=2, layer_types=["chunked_attention", "sliding_attention"])
    ],
    "sliding_window=8": [
        lambda: MistralConfig(**SHAPE, sliding_window=8),
        lambda: Phi3Config(**SHAPE, sliding_window=8),
        lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        lambda: Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=0),
    ],
    "rope_parameters.rope_type='dynamic'": [lambda: rope(rope_type="dynamic", factor=2.0)],
    "rope_parameters.rope_type='llama3'": [
        lambda: Qwen2Config(**SHAPE, rope_parameters={**LLAMA3, "original_max_position_embeddings": 64})
    ],
    "rope_parameters.rope_type='longrope'": [
        lambda: Phi3Config(**SHAPE, pad_token_id=0, rope_parameters={**LONG, "original_max_position_embeddings": 32})
    ],
    "rope_parameters['full_attention'].rope_type='yarn'": [
        lambda: gemma3(rope_parameters={**GEMMA3_ROPE, "full_attention": YARN})
    ],
    "rope_parameters['sliding_attention'].rope_type='linear'": [lambda: gemma3(rope_parameters=OVERLAP)],
    "rope_parameters.partial_rotary_factor=0.5": [
        lambda: rope(partial_rotary_factor=0.5),
        lambda: Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ],
    "rope_parameters.beta_fast=4.0": [lambda: rope(**YARN, beta_fast=4.0)],
    "rope_parameters.beta_slow=0.25": [lambda: rope(**YARN, beta_slow=0.25)],
    "rope_parameters.truncate=False": [lambda: rope(**YARN, truncate=False)],
}


@pytest.mark.parametrize(("says", "make"), [(says, make) for says, all_ in REFUSED.items() for make in all_])
def test_what_llama_cpp_computes_otherwise_is_refused(says, make):
    with pytest.raises(ValueError) as caught:
        check_config(make())
    assert str(caught.value).startswith(f"{says} cannot be written as GGUF: llama.cpp ")
    assert "export the model as 'compressed-tensors' or 'dense'" in str(caught.value)


def test_a_gemma_2_whose_attention_was_not_capped_is_refused():
    """As older versions of transformers leave it out of sdpa, which is their default."""
    config = gemma2()
    config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"attn_implementation=.sdpa. cannot be written as GGUF: transformers then"):
        check_config(config)


def test_an_export_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_dlqat.export.export.trained_logits", lambda *_: pytest.fail("it was run"))
    model = adapted("phi3", bits=4)
    model.get_base_model().config.sliding_window = 8
    with refused(ValueError, "sliding_window=8", "max_position_embeddings = 8", model=model, folder=tmp_path):
        export_model(model, tmp_path / "out", "gguf")


@pytest.mark.parametrize("config", [MistralConfig, Phi3Config])
def test_a_window_that_no_text_reaches_is_none(config):
    check_config(config(**SHAPE, sliding_window=64))
    with pytest.raises(ValueError, match="sliding_window=63"):
        check_config(config(**SHAPE, sliding_window=63))


@pytest.mark.parametrize(("config", "layers"), [(Gemma2Config, 46), (Gemma3TextConfig, 62)])
def test_a_gemma_of_27b_scales_its_queries_by_the_width(config, layers):
    """llama.cpp knows it by its number of layers."""

    def of(layers, scalar):
        sizes = {"hidden_size": 160, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 10}
        return config(**sizes, num_hidden_layers=layers, query_pre_attn_scalar=scalar)

    check_config(of(layers, 40))
    check_config(of(layers + 1, 16))
    for wrong in (of(layers, 16), of(layers + 1, 40)):
        with pytest.raises(ValueError, match="query_pre_attn_scalar="):
            check_config(wrong)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_field_that_a_class_declares_is_known(kind):
    """One that transformers adds is refused where it is not as usual, until it is known here what it does."""
    declared = gguf_checks._declared(type(AutoConfig.for_model(kind)))
    assert declared - gguf_checks._KNOWN - set(ARCHITECTURES[kind].assumed) == set()


@pytest.mark.parametrize("kind", CONFIGS)
def test_usual_configs_pass_without_a_word(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config(CONFIGS[kind]())


class WithGain(LlamaConfig):
    """A config with a field that is not known here."""

    model_type = "llama"

    def __init__(self, gain=1.0, **settings):
        super().__init__(**settings)
        self.gain = gain


def test_a_field_that_is_not_known_is_refused_where_it_is_not_as_usual(monkeypatch):
    monkeypatch.setattr(WithGain, "__module__", "transformers.models.new")
    check_config(WithGain(**SHAPE))
    with pytest.raises(ValueError, match=r"gain=2\.0 cannot be written as GGUF: it is not known here"):
        check_config(WithGain(gain=2.0, **SHAPE))


def test_code_from_elsewhere_has_no_usual_value():
    with pytest.raises(ValueError, match=r"gain=1\.0 cannot be written as GGUF: it is not known here"):
        check_config(WithGain(**SHAPE))


def test_keys_that_no_class_declares():
    """As SmolLM2's own config has them."""
    settings = {"is_llama_config": True, "rope_interleaved": False}
    config = llama(**settings, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "strange": 1})
    with pytest.warns(UserWarning, match="not declare is_llama_config, rope_interleaved, rope_parameters.strange,"):
        check_config(config)

    class Remote(LlamaConfig):
        model_type = "llama"

    with pytest.raises(
        ValueError, match="is_llama_config=True cannot be written as GGUF: Remote is not transformers'"
    ):
        check_config(Remote(**SHAPE, **settings))


@pytest.mark.parametrize(
    ("key", "value"), [("rope.freq_base", 500000.0), ("block_count", 3), ("attention.layer_norm_epsilon", 1e-6)]
)
def test_a_config_of_any_architecture_is_compared_with_a_file(key, value):
    """By what no tensor shows; StableLM is none of those that are written here."""
    config = StableLmConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    said = {"block_count": 2, "embedding_length": 64, "rope.freq_base": 10000.0, "attention.layer_norm_epsilon": 1e-5}

    def file(**changes):
        metadata = {f"stablelm.{name}": own for name, own in (said | changes).items()}
        return SimpleNamespace(architecture="stablelm", metadata=metadata, tensors={})

    assert check_basics(file(), config) == []
    with pytest.raises(ValueError, match=f"it says {key}="):
        check_basics(file(**{key: value}), config)
