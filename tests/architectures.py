"""Tiny models of many architectures, with random weights: the rows of docs/architectures.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import architecture_nets
import torch
import transformers
from torch import nn

VOCAB = 96

Inputs = Callable[[], dict[str, torch.Tensor]]


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(10, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def both() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": numbers(2, 3, 32, 32)}


def captioned() -> dict[str, torch.Tensor]:
    return text() | image()


def wave() -> dict[str, torch.Tensor]:
    return {"input_values": numbers(2, 1600)}


def vector() -> dict[str, torch.Tensor]:
    return {"x": numbers(2, 6, 32)}


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = GROUPED | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@dataclass(frozen=True, eq=False)
class Architecture:
    """A kind of model: a class of transformers with its config's settings, or a net of `architecture_nets`."""

    kind: str
    name: str
    inputs: Inputs = text
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """The model, the same at each call, with weights of a trained one's size."""
        torch.manual_seed(0)
        if hasattr(architecture_nets, self.name):
            model = getattr(architecture_nets, self.name)()
        else:
            cls = getattr(transformers, self.name)
            config = cls.config_class(**self.settings)
            _without_chance(config)
            model = cls(config)
        for parameter in model.parameters():
            if parameter.requires_grad:  # sinusoids don't, and are not saved
                parameter.data += 0.05 * torch.randn_like(parameter)
        return model.requires_grad_(False).eval()


def _without_chance(config: Any) -> None:
    """No dropout, no dropped layers, no masks, no noise, whatever a config calls them."""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            _without_chance(value)
        elif isinstance(value, float) and any(word in name for word in ("drop", "jitter", "noise")):
            setattr(config, name, 0.0)
        elif name == "apply_spec_augment":
            setattr(config, name, False)


def each(kind: str, names: str, inputs: Inputs = text, **settings: Any) -> list[Architecture]:
    return [Architecture(kind, name, inputs, settings) for name in names.split()]


LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
PAIR = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
WAVE = TEXT | {
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "squeeze_factor": 2,
}
TOWERS = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}
SPEECHT5 = WAVE | {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_mel_bins": 8,
    "speech_decoder_prenet_units": 16,
    "speech_decoder_postnet_units": 16,
    "speech_decoder_postnet_layers": 2,
}
LLAVA = {
    "text_config": GROUPED | {"model_type": "llama"},
    "vision_config": IMAGE | {"model_type": "clip_vision_model"},
    "image_token_id": 5,
    "image_token_index": 5,
}
QWEN = GROUPED | {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}
QWEN_VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "mlp_ratio": 2,
    "fullatt_block_indexes": [1],
    "window_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}


def globally():
    return both() | {"global_attention_mask": (torch.arange(12) < 2).long().expand(2, -1)}


def video():
    return {"pixel_values": numbers(2, 4, 3, 32, 32)}


def features(*shape):
    return lambda: {"input_features": numbers(2, *shape)}


def heard(*shape):
    return lambda: {"input_features": numbers(2, *shape), "decoder_input_ids": tokens(5)}


def shown(count):
    return lambda: {
        "input_ids": torch.cat([torch.full((2, count), 5), tokens()], 1),
        "pixel_values": numbers(2, 3, 32, 32),
    }


def patches(side):
    return lambda: {
        "input_ids": torch.cat([torch.full((1, side * side // 4), 5), tokens()[:1]], 1),
        "pixel_values": numbers(side * side, 48),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": (torch.arange(side * side // 4 + 12) < side * side // 4).int()[None],
    }


# A row is a line.
# fmt: off
ARCHITECTURES = [
    *each("torch", architecture_nets.NETS, vector),
    *each(
        "decoder",
        "LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM "
        "Gemma3ForCausalLM PhiForCausalLM Phi3ForCausalLM CohereForCausalLM Cohere2ForCausalLM OlmoForCausalLM "
        "Olmo2ForCausalLM StableLmForCausalLM Starcoder2ForCausalLM GraniteForCausalLM GlmForCausalLM Glm4ForCausalLM "
        "NemotronForCausalLM SmolLM3ForCausalLM Exaone4ForCausalLM HeliumForCausalLM PersimmonForCausalLM "
        "DiffLlamaForCausalLM BitNetForCausalLM ArceeForCausalLM ApertusForCausalLM DogeForCausalLM SeedOssForCausalLM "
        "NanoChatForCausalLM ModernBertDecoderForCausalLM",
        **GROUPED,
    ),
    *each(
        "decoder",
        "GPT2LMHeadModel GPTNeoXForCausalLM GPTBigCodeForCausalLM BloomForCausalLM MptForCausalLM BioGptForCausalLM "
        "OpenAIGPTLMHeadModel FalconForCausalLM",
        **TEXT,
    ),
    *each("decoder", "GPTNeoForCausalLM", **TEXT, attention_types=[[["global", "local"], 1]]),
    *each("decoder", "GPTJForCausalLM CodeGenForCausalLM", **TEXT, rotary_dim=8),
    *each("decoder", "OPTForCausalLM", **TEXT, ffn_dim=64, word_embed_proj_dim=16),
    *each("decoder", "XGLMForCausalLM", **TEXT, ffn_dim=64),
    *each("decoder", "CTRLLMHeadModel", **TEXT, dff=64),
    *each("decoder", "XLNetLMHeadModel", vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64),
    *each(
        "mixture of experts",
        "MixtralForCausalLM OlmoeForCausalLM PhimoeForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM "
        "Qwen2MoeForCausalLM Qwen3MoeForCausalLM JetMoeForCausalLM GptOssForCausalLM HunYuanMoEV1ForCausalLM "
        "FlexOlmoForCausalLM AriaTextForCausalLM MiniMaxForCausalLM Ernie4_5_MoeForCausalLM Glm4MoeForCausalLM",
        **EXPERTS,
    ),
    *each("mixture of experts", "Llama4ForCausalLM", **EXPERTS, intermediate_size_mlp=64, attention_chunk_size=8),
    *each("mixture of experts", "DbrxForCausalLM", vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
          attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}),
    *each("mixture of experts", "DeepseekV2ForCausalLM DeepseekV3ForCausalLM", **(EXPERTS | {"num_key_value_heads": 4}), **LATENT, n_group=1, topk_group=1, first_k_dense_replace=1),
    *each("mixture of experts", "LongcatFlashForCausalLM", **(TEXT | LATENT | {"head_dim": 8}), ffn_hidden_size=64, expert_ffn_hidden_size=32, num_layers=1, moe_topk=2, n_routed_experts=4, zero_expert_num=1),
    *each("mixture of experts", "Dots1ForCausalLM", **EXPERTS, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1),
    *each("mixture of experts", "SwitchTransformersForConditionalGeneration", both, vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4, expert_capacity=16),
    *each("mixture of experts", "NllbMoeForConditionalGeneration", both, **PAIR, num_experts=4, expert_capacity=16, encoder_sparse_step=2, decoder_sparse_step=2),
    *each("state space", "MambaForCausalLM FalconMambaForCausalLM", **TEXT, state_size=8, time_step_rank=16),
    *each("state space", "Mamba2ForCausalLM", **TEXT, state_size=8, num_heads=8, n_groups=1, chunk_size=8, head_dim=8),
    *each("state space", "JambaForCausalLM", **EXPERTS, mamba_d_state=8, mamba_dt_rank=16, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    *each("state space", "GraniteMoeHybridForCausalLM", **EXPERTS, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_chunk_size=8, layer_types=["mamba", "attention"]),
    *each("state space", "BambaForCausalLM", **GROUPED, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_chunk_size=8, attn_layer_indices=[1]),
    *each("state space", "FalconH1ForCausalLM", **GROUPED, mamba_d_ssm=32, mamba_d_state=8, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_chunk_size=8),
    *each("state space", "ZambaForCausalLM", **(TEXT | {"num_hidden_layers": 3, "num_key_value_heads": 4}), layer_types=["mamba", "hybrid", "hybrid"], mamba_d_state=8, mamba_dt_rank=16, use_mamba_kernels=False, n_mamba_heads=2),
    *each("state space", "Zamba2ForCausalLM", **(TEXT | {"num_hidden_layers": 3}), layers_block_type=["mamba", "hybrid", "hybrid"], mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1, adapter_rank=8, use_mamba_kernels=False),
    *each("state space", "RwkvForCausalLM", **TEXT, attention_hidden_size=32, rescale_every=0),  # else it divides weights in place
    *each("state space", "RecurrentGemmaForCausalLM", **GROUPED, lru_width=32, block_types=["recurrent", "attention"], attention_window_size=8),
    *each("state space", "Lfm2ForCausalLM", **GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=32),
    *each("state space", "Lfm2MoeForCausalLM", **EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1),
    *each("state space", "NemotronHForCausalLM", **GROUPED, hybrid_override_pattern="M*-", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8),
    *each("state space", "Qwen3NextForCausalLM Qwen3_5ForCausalLM OlmoHybridForCausalLM", **EXPERTS, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8),
    *each("state space", "KimiLinearForCausalLM", **(EXPERTS | LATENT | {"num_key_value_heads": 4}), layer_types=["linear_attention", "full_attention"], linear_head_dim=8, linear_num_heads=4),
    *each(
        "encoder",
        "BertForMaskedLM RobertaForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM ModernBertForMaskedLM "
        "FNetForMaskedLM EsmForMaskedLM MPNetForMaskedLM NystromformerForMaskedLM RoFormerForMaskedLM "
        "XLMWithLMHeadModel IBertForMaskedLM MegatronBertForMaskedLM CamembertForMaskedLM YosoForMaskedLM "
        "NomicBertForMaskedLM EuroBertForMaskedLM BigBirdForMaskedLM BertForSequenceClassification "
        "RobertaForSequenceClassification",
        **TEXT,
    ),
    *each("encoder", "AlbertForMaskedLM ElectraForMaskedLM RemBertForMaskedLM", **TEXT, embedding_size=16, input_embedding_size=16, output_embedding_size=16, inner_group_num=1),
    *each("encoder", "ConvBertForMaskedLM", **TEXT, embedding_size=32, conv_kernel_size=3),
    *each("encoder", "DistilBertForMaskedLM DistilBertForSequenceClassification", **TEXT, hidden_dim=64),
    *each("encoder", "MobileBertForMaskedLM", **TEXT, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2),
    *each("encoder", "SqueezeBertForMaskedLM", **TEXT, embedding_size=32),
    *each("encoder", "FunnelForMaskedLM", vocab_size=VOCAB, d_model=32, d_inner=64, n_head=4, d_head=8, block_sizes=[1, 1], num_decoder_layers=1),
    *each("encoder", "LongformerForMaskedLM", lambda: text() | {"global_attention_mask": (torch.arange(12) < 2).long().expand(2, -1)}, **TEXT, attention_window=4),
    *each("encoder", "XmodForMaskedLM", **TEXT, languages=["en_XX"], default_language="en_XX"),
    *each("encoder", "LukeForMaskedLM", lambda: text() | {"entity_ids": tokens(2) % 10, "entity_position_ids": torch.arange(4).view(1, 2, 2).expand(2, -1, -1)}, **TEXT, entity_vocab_size=10, entity_emb_size=16),
    *each("encoder-decoder", "T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration LongT5ForConditionalGeneration", both, vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, feed_forward_proj="gated-gelu"),
    *each("encoder-decoder", "BartForConditionalGeneration MBartForConditionalGeneration PegasusForConditionalGeneration MarianMTModel M2M100ForConditionalGeneration BlenderbotForConditionalGeneration BlenderbotSmallForConditionalGeneration PLBartForConditionalGeneration MvpForConditionalGeneration BigBirdPegasusForConditionalGeneration PegasusXForConditionalGeneration", both, **PAIR),
    *each("encoder-decoder", "LEDForConditionalGeneration", globally, **PAIR, attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    *each("encoder-decoder", "ProphetNetForConditionalGeneration", both, vocab_size=VOCAB, hidden_size=32, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4, num_decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64),
    *each("encoder-decoder", "FSMTForConditionalGeneration", both, src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, langs=["en", "de"], **PAIR),
    *each("encoder-decoder", "T5GemmaForConditionalGeneration", both, encoder=GROUPED, decoder=GROUPED | {"cross_attention_hidden_size": 32}, vocab_size=VOCAB),
    *each("vision", "ViTForImageClassification DeiTForImageClassification BeitForImageClassification Data2VecVisionForImageClassification Dinov2ForImageClassification Dinov2WithRegistersForImageClassification IJepaForImageClassification ViTMSNForImageClassification ViTMAEForPreTraining", image, **IMAGE, decoder_num_hidden_layers=1, decoder_hidden_size=32, decoder_intermediate_size=64, decoder_num_attention_heads=4),
    *each("vision", "SiglipForImageClassification CLIPForImageClassification", image, vision_config=IMAGE, num_labels=3),
    *each("vision", "YolosForObjectDetection", image, **(IMAGE | {"image_size": [32, 32]}), num_detection_tokens=5),
    *each("vision", "SwinForImageClassification Swinv2ForImageClassification DonutSwinForImageClassification", image, image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3),
    *each("vision", "ConvNextForImageClassification ConvNextV2ForImageClassification", image, depths=[1, 1], hidden_sizes=[16, 32], num_stages=2, num_labels=3),
    *each("vision", "ResNetForImageClassification RegNetForImageClassification", image, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, num_labels=3),
    *each("vision", "SegformerForImageClassification SegformerForSemanticSegmentation GLPNForDepthEstimation", image, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3),
    *each("vision", "PvtForImageClassification PvtV2ForImageClassification", image, image_size=32, num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], num_labels=3),
    *each("vision", "MobileViTForImageClassification", image, image_size=32, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32], num_labels=3),
    *each("vision", "PoolFormerForImageClassification", image, depths=[1, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1], num_encoder_blocks=2, num_labels=3),
    *each("vision", "LevitForImageClassification", image, image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=3),
    *each("vision", "CvtForImageClassification", image, embed_dim=[16, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3], mlp_ratio=[2.0, 2.0, 2.0], num_stages=3, num_labels=3),
    *each("vision", "FocalNetForImageClassification", image, image_size=32, embed_dim=16, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3], hidden_sizes=[16, 32], num_labels=3),
    *each("vision", "HieraForImageClassification", image, image_size=[32, 32], embed_dim=16, depths=[1, 1], num_heads=[1, 2], num_query_pool=1, masked_unit_size=[4, 4], masked_unit_attention=[True, False], num_labels=3),
    *each("vision", "DPTForDepthEstimation", image, **(IMAGE | {"num_hidden_layers": 4}), backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False),
    *each("vision", "DetrForObjectDetection", image, **PAIR, num_queries=5, backbone_config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}),
    *each("vision", "Mask2FormerForUniversalSegmentation", image, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64, encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=64, num_queries=5, num_labels=3, backbone_config={"model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2, "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
    *each("vision", "SamModel", lambda: image() | {"input_points": numbers(2, 1, 2, 2)}, vision_config=IMAGE | {"output_channels": 16, "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 8, "mlp_dim": 64}, prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}, mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}),
    *each("vision", "VideoMAEForVideoClassification", video, **IMAGE, num_frames=4, tubelet_size=2),
    *each("vision", "TimesformerForVideoClassification", video, **IMAGE, num_frames=4),
    *each("audio", "Wav2Vec2ForCTC HubertForCTC WavLMForCTC UniSpeechForCTC UniSpeechSatForCTC SEWForCTC SEWDForCTC Data2VecAudioForCTC Wav2Vec2ConformerForCTC Wav2Vec2ForSequenceClassification", wave, **WAVE),
    *each("audio", "Wav2Vec2BertForCTC", features(20, 16), **TEXT, feature_projection_input_dim=16, add_adapter=False),
    *each("audio", "WhisperForConditionalGeneration", heard(8, 20), **PAIR, num_mel_bins=8, max_source_positions=10, max_target_positions=64),
    *each("audio", "Speech2TextForConditionalGeneration", heard(20, 8), **PAIR, input_feat_per_channel=8, conv_channels=16, num_conv_layers=1, conv_kernel_sizes=[3], max_source_positions=64, max_target_positions=64),
    *each("audio", "ASTForAudioClassification", lambda: {"input_values": numbers(2, 32, 16)}, **IMAGE, max_length=32, num_mel_bins=16),
    *each("audio", "MoonshineForConditionalGeneration", lambda: wave() | {"decoder_input_ids": tokens(5)}, vocab_size=VOCAB, hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, encoder_num_attention_heads=4, decoder_num_attention_heads=4),
    *each("audio", "SpeechT5ForSpeechToText", lambda: wave() | {"decoder_input_ids": tokens(5)}, **SPEECHT5),
    *each("audio", "SpeechT5ForTextToSpeech", lambda: text() | {"decoder_input_values": numbers(2, 6, 8)}, **SPEECHT5),
    *each("audio", "EncodecModel", lambda: {"input_values": numbers(2, 1, 640)}, num_filters=4, hidden_size=16, codebook_size=16),
    *each("audio", "MimiModel", lambda: {"input_values": numbers(2, 1, 3840)}, **GROUPED, num_filters=4, codebook_size=16, codebook_dim=16, num_quantizers=2, vector_quantization_hidden_dimension=16, upsample_groups=32),
    *each("audio", "MusicgenForCausalLM", lambda: {"input_ids": tokens().view(2, 12).repeat_interleave(2, 0)}, **TEXT, ffn_dim=64, num_codebooks=2),
    *each("audio", "BarkSemanticModel", block_size=64, input_vocab_size=VOCAB, output_vocab_size=VOCAB, num_layers=2, num_heads=4, hidden_size=32),
    *each("audio", "ParakeetForCTC", features(32, 16), vocab_size=VOCAB, pad_token_id=0, encoder_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "subsampling_conv_channels": 8, "num_mel_bins": 16}),
    *each("vision-language", "CLIPModel SiglipModel AltCLIPModel ChineseCLIPModel BlipModel MetaClip2Model", captioned, **TOWERS),
    *each("vision-language", "CLIPSegForImageSegmentation", captioned, **TOWERS, extract_layers=[0, 1], reduce_dim=16, decoder_num_attention_heads=4, decoder_intermediate_size=32),
    *each("vision-language", "Siglip2Model", lambda: text() | {"pixel_values": numbers(2, 16, 48), "pixel_attention_mask": torch.ones(2, 16).long(), "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}, text_config=TEXT, vision_config=IMAGE | {"patch_size": 4, "num_patches": 16}),
    *each("vision-language", "OwlViTForObjectDetection", captioned, **(TOWERS | {"projection_dim": 32})),
    *each("vision-language", "BlipForConditionalGeneration", captioned, **TOWERS),
    *each("vision-language", "GitForCausalLM", captioned, **TEXT, vision_config=IMAGE),
    *each("vision-language", "ViltForMaskedLM", captioned, **(TEXT | IMAGE)),
    *each("vision-language", "LlavaForConditionalGeneration", shown(16), **LLAVA),
    *each("vision-language", "VipLlavaForConditionalGeneration", shown(16), **LLAVA, vision_feature_layers=[-1, -2]),
    *each("vision-language", "PaliGemmaForConditionalGeneration", shown(16), text_config=GROUPED | {"model_type": "gemma"}, vision_config=IMAGE | {"model_type": "siglip_vision_model", "projection_dim": 32}, image_token_index=5, projection_dim=32),
    *each("vision-language", "Gemma3ForConditionalGeneration", shown(4), text_config=GROUPED, vision_config=IMAGE | {"model_type": "siglip_vision_model"}, image_token_index=5, mm_tokens_per_image=4),
    *each("vision-language", "Idefics3ForConditionalGeneration SmolVLMForConditionalGeneration", lambda: shown(4)() | {"pixel_values": numbers(2, 1, 3, 32, 32)}, text_config=GROUPED | {"model_type": "llama"}, vision_config=IMAGE, image_token_id=5, scale_factor=2),
    *each("vision-language", "Mistral3ForConditionalGeneration", lambda: shown(4)() | {"image_sizes": torch.tensor([[32, 32], [32, 32]])}, text_config=GROUPED | {"model_type": "mistral"}, vision_config=IMAGE | {"model_type": "pixtral", "head_dim": 8}, image_token_index=5, spatial_merge_size=2),
    *each("vision-language", "InternVLForConditionalGeneration", shown(4), text_config=GROUPED | {"model_type": "qwen2"}, vision_config=IMAGE | {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8]}, image_token_id=5),
    *each("vision-language", "AyaVisionForConditionalGeneration Cohere2VisionForConditionalGeneration", shown(4), text_config=GROUPED | {"model_type": "cohere2"}, vision_config=IMAGE | {"model_type": "siglip_vision_model"}, image_token_id=5, image_token_index=5, alignment_intermediate_size=32),
    *each("vision-language", "AriaForConditionalGeneration", shown(4), text_config=EXPERTS | {"model_type": "aria_text"}, vision_config=IMAGE | {"model_type": "idefics3_vision"}, image_token_index=5, projector_patch_to_query_dict={16: 4}),
    *each("vision-language", "Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration", patches(8), text_config=QWEN, vision_config=QWEN_VISION, image_token_id=5),
    *each("vision-language", "Qwen3VLForConditionalGeneration", patches(8), text_config=QWEN, vision_config=QWEN_VISION, image_token_id=5),
    *each("vision-language", "MllamaForConditionalGeneration", lambda: text() | {"pixel_values": numbers(2, 1, 1, 3, 32, 32), "aspect_ratio_ids": torch.ones(2, 1).long(), "aspect_ratio_mask": torch.ones(2, 1, 1).long(), "cross_attention_mask": torch.ones(2, 12, 1, 1).long()}, text_config=GROUPED | {"cross_attention_layers": [1]}, vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 64, "vision_output_dim": 64, "image_size": 32, "patch_size": 8, "max_num_tiles": 1, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}, image_token_index=5),
    *each("vision-language", "Blip2ForConditionalGeneration", shown(4), text_config=TEXT | {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}, vision_config=IMAGE, qformer_config=TEXT | {"encoder_hidden_size": 32}, num_query_tokens=4, image_token_index=5),
    *each("vision-language", "InstructBlipForConditionalGeneration", lambda: shown(4)() | {"qformer_input_ids": tokens(5)}, text_config=TEXT | {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}, vision_config=IMAGE, qformer_config=TEXT | {"encoder_hidden_size": 32}, num_query_tokens=4, image_token_index=5),
    *each("vision-language", "Llama4ForConditionalGeneration", shown(4), text_config=EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 8}, vision_config=IMAGE | {"pixel_shuffle_ratio": 0.5, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128}, image_token_index=5),
    *each("vision-language", "ChameleonForConditionalGeneration", **GROUPED, vq_config={"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 32, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}, vocabulary_map={"<image>": 5}),
    *each("vision-language", "FuyuForCausalLM", lambda: {"input_ids": shown(4)()["input_ids"], "image_patches": numbers(2, 4, 192), "image_patches_indices": torch.cat([torch.arange(4), torch.full((12,), -1)]).expand(2, -1)}, text_config=TEXT | {"model_type": "persimmon"}, patch_size=8, image_token_id=5, hidden_size=32),
    *each("vision-language", "Qwen2AudioForConditionalGeneration", lambda: {"input_ids": torch.cat([torch.full((2, 5), 5), tokens()], 1), "attention_mask": torch.ones(2, 17).long(), "input_features": numbers(2, 8, 20), "feature_attention_mask": torch.ones(2, 20).long()}, text_config=GROUPED | {"model_type": "qwen2"}, audio_config={"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 32, "max_source_positions": 10}, audio_token_index=5),
    *each("time series", "PatchTSTForPrediction PatchTSMixerForPrediction", lambda: {"past_values": numbers(2, 32, 2)}, num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=32, num_hidden_layers=1, num_layers=1, ffn_dim=64, prediction_length=4, loss="mse", num_attention_heads=4),
    *each("time series", "TimesFmModelForPrediction", lambda: {"past_values": numbers(2, 64)}, patch_length=16, context_length=64, horizon_length=16, num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8, num_attention_heads=4),
    *each("time series", "DecisionTransformerModel", lambda: {"states": numbers(2, 4, 6), "actions": numbers(2, 4, 3), "rewards": numbers(2, 4, 1), "returns_to_go": numbers(2, 4, 1), "timesteps": torch.arange(4).expand(2, -1), "attention_mask": torch.ones(2, 4).long()}, state_dim=6, act_dim=3, hidden_size=32, max_ep_len=16, n_layer=1, n_head=4, n_inner=64, n_positions=64),
]
