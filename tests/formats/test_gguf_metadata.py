"""What the header of a GGUF file says of a config; that engines read it so is tested in test_gguf and test_engines."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, PhiConfig

from peft_dlqat.formats.gguf_metadata import ARCHITECTURES, architecture, rope_factors, write_metadata

gguf = pytest.importorskip("gguf")


class Writer(dict):
    """What is written, by the names of a `gguf.GGUFWriter`'s methods."""

    def __getattr__(self, name):
        return lambda value: self.update({name.removeprefix("add_"): value})


def written(config):
    writer = Writer()
    write_metadata(writer, config, architecture(config), "a model")
    return writer


def llama(**settings):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaConfig(
        **{**sizes, "num_key_value_heads": 2, "vocab_size": 10, "max_position_embeddings": 32, **settings}
    )


def test_sizes_of_a_llama():
    expected = {
        "name": "a model",
        "block_count": 3,
        "context_length": 32,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "head_count": 4,
        "head_count_kv": 2,
        "vocab_size": 10,
        "layer_norm_rms_eps": 1e-6,
        "rope_dimension_count": 16,
        "rope_freq_base": 10000.0,
    }
    assert written(llama()) == expected
    assert written(llama(head_dim=16)) == expected
    own = {"key_length": 8, "value_length": 8, "rope_dimension_count": 8}
    assert written(llama(head_dim=8)) == expected | own


def test_defaults_that_a_config_leaves_out():
    gpt2 = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 10}
    found = written(GPT2Config(**gpt2))
    assert (found["feed_forward_length"], found["head_count_kv"]) == (256, 4)
    assert found["layer_norm_eps"] == 1e-5 and "rope_freq_base" not in found
    assert written(GPT2Config(**gpt2, n_inner=100))["feed_forward_length"] == 100
    phi = PhiConfig(hidden_size=64, num_attention_heads=4, partial_rotary_factor=0.5, layer_norm_eps=1e-4)
    assert written(phi)["rope_dimension_count"] == 8 and written(phi)["layer_norm_eps"] == 1e-4


@pytest.mark.parametrize("config, layers, heads, scalar", [(Gemma2Config, 46, 4, 40), (Gemma3TextConfig, 62, 4, 40)])
def test_a_gemma_of_27b_scales_its_queries_by_the_width(config, layers, heads, scalar):
    """llama.cpp knows it by its number of layers."""

    def of(layers, scalar):
        sizes = {"hidden_size": 160, "num_attention_heads": heads, "head_dim": 16, "vocab_size": 10}
        return config(**sizes, num_hidden_layers=layers, query_pre_attn_scalar=scalar)

    assert written(of(layers, scalar))["block_count"] == layers
    assert written(of(layers + 1, 16))["block_count"] == layers + 1
    for wrong in (of(layers, 16), of(layers + 1, scalar)):
        with pytest.raises(ValueError, match=r"query_pre_attn_scalar=.* cannot be written as GGUF"):
            written(wrong)


def test_scaled_rotary_embeddings():
    def of(**rope):
        return llama(rope_parameters={"rope_theta": 1e4, **rope})

    found = written(of(rope_type="linear", factor=4.0))
    assert found["rope_scaling_type"] is gguf.RopeScalingType.LINEAR and found["rope_scaling_factor"] == 4.0
    found = written(of(rope_type="yarn", factor=2.0, original_max_position_embeddings=16))
    assert found["rope_scaling_type"] is gguf.RopeScalingType.YARN and found["rope_scaling_orig_ctx_len"] == 16
    with pytest.raises(ValueError, match="rope_type='dynamic' cannot be written"):
        written(of(rope_type="dynamic", factor=2.0))
    three = of(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    assert "rope_scaling_type" not in written(three)
    factors = rope_factors(three)
    assert factors.shape == (8,) and factors[0] == 1 and factors[-1] == pytest.approx(8)
    assert rope_factors(llama()) is None


def test_rows_of_queries_and_keys_come_in_pairs():
    """Element i of the first half of a head beside element i of its second half."""
    config = llama(num_attention_heads=2, num_key_value_heads=1)
    order = ARCHITECTURES["llama"].row_order
    assert order("model.layers.0.self_attn.q_proj.weight", config, 8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert order("model.layers.0.self_attn.k_proj.weight", config, 4).tolist() == [0, 2, 1, 3]
    assert order("model.layers.0.self_attn.v_proj.weight", config, 4) == slice(None)
    assert ARCHITECTURES["qwen2"].row_order("model.layers.0.self_attn.q_proj.weight", config, 8) == slice(None)


def test_gemmas_norms_are_written_with_their_offset():
    ones = torch.ones(3)
    assert ARCHITECTURES["gemma"].adjusted("model.norm.weight", ones).tolist() == [2.0, 2.0, 2.0]
    assert ARCHITECTURES["gemma"].adjusted("model.embed_tokens.weight", ones) is ones
    assert ARCHITECTURES["llama"].adjusted("model.norm.weight", ones) is ones


def test_a_window_that_the_file_cannot_hold_is_said():
    (note,) = ARCHITECTURES["mistral"].notes(MistralConfig(sliding_window=77))
    assert "up to 77 tokens" in note
    assert ARCHITECTURES["mistral"].notes(MistralConfig(sliding_window=None)) == []
    assert ARCHITECTURES["gemma2"].notes(Gemma2Config(sliding_window=77)) == []


def test_a_model_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="model_type='opt' cannot be written as GGUF, only 'llama'"):
        architecture(llama_as("opt"))


def llama_as(kind):
    config = llama()
    config.model_type = kind
    return config


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(ValueError, match=r"no place for 1 of the model's tensors: model\.gate\.weight; export it as"):
        ARCHITECTURES["llama"].tensor_names(llama(), ["model.norm.weight", "model.gate.weight"])
