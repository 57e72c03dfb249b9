"""What the header of a GGUF file says of a config; engines read it so in test_gguf and test_llama_cpp."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PhiConfig

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
        "key_length": 16,
        "value_length": 16,
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


def test_scaled_rotary_embeddings():
    def of(**rope):
        return llama(rope_parameters={"rope_theta": 1e4, **rope})

    found = written(of(rope_type="linear", factor=4.0))
    assert found["rope_scaling_type"] is gguf.RopeScalingType.LINEAR and found["rope_scaling_factor"] == 4.0
    found = written(of(rope_type="yarn", factor=2.0, original_max_position_embeddings=16))
    assert found["rope_scaling_type"] is gguf.RopeScalingType.YARN and found["rope_scaling_orig_ctx_len"] == 16
    assert "rope_scaling_attn_factors" not in found
    found = written(of(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=2.0))
    assert found["rope_scaling_attn_factors"] == pytest.approx(2.0 / (1 + 0.1 * math.log(4)))
    of_two = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    found = written(of(**of_two, original_max_position_embeddings=16))
    assert found["rope_scaling_attn_factors"] == pytest.approx(1 / (1 + 0.05 * math.log(4)))
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
