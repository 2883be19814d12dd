"""Tiny random models of many architectures, with an input for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TEXT = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "head_dim": 8,
    "pad_token_id": 0,
}
HALF: dict[str, Any] = {**TEXT, "num_key_value_heads": 4}
NO_HEADS = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
MAMBA = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
SSM = {
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    """Random token ids `[rows, length]` without padding."""
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(3))


def text() -> dict[str, Any]:
    """Two texts."""
    return {"input_ids": ids()}


def pixels() -> dict[str, Any]:
    """Two images."""
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))}


def both_texts() -> dict[str, Any]:
    """Two texts for an encoder, and longer ones for its decoder."""
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 15)}


def speech() -> dict[str, Any]:
    """Two spectrograms for an encoder, and texts for its decoder."""
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(4))
    return {"input_features": features, "decoder_input_ids": ids(2, 5)}


def waves() -> dict[str, Any]:
    """Two waveforms."""
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(4))}


def texts_and_images() -> dict[str, Any]:
    """Three texts and two images."""
    return {"input_ids": ids(3, 7), **pixels()}


def texts_with_images() -> dict[str, Any]:
    """Two texts with four placeholders for the patches of their images."""
    words = ids()
    words[:, 1:5] = 259
    return {"input_ids": words, **pixels()}


def text_with_patches() -> dict[str, Any]:
    """Two texts with four placeholders for sixteen patches of one image each."""
    words = ids()
    words[:, 1:5] = 259
    patches = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(4))
    kinds = (words == 259).int()
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {
        "input_ids": words,
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


@dataclass(frozen=True)
class Architecture:
    """A tiny random model of one architecture.

    Args:
        model: The class of transformers.
        settings: The arguments of its configuration; nested ones are configurations of its parts.
        inputs: A function that makes an input.
    """

    model: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Any]] = text

    def build(self, **changes: Any) -> Any:
        """Build the model in float32 and in eval mode."""
        import transformers

        torch.manual_seed(0)
        kind: Any = getattr(transformers, self.model)
        model = kind(kind.config_class(**self.settings | changes)).eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # The others know no float64.
        with torch.no_grad():  # Weights that start as zero or equal would hide faults.
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape) * 0.05
        return model


ROUTED_EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts": 4,
}
ENCODER_DECODER = {
    "vocab_size": 260,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
LATENT = {
    **HALF,
    **ROUTED_EXPERTS,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
TOWERS = {
    "text_config": {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")},
    "vision_config": VISION,
    "projection_dim": 16,
}

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", TEXT),
    "qwen2": Architecture("Qwen2ForCausalLM", TEXT),
    "qwen3": Architecture("Qwen3ForCausalLM", TEXT),
    "gemma2": Architecture("Gemma2ForCausalLM", {**TEXT, "sliding_window": 8}),
    "gemma3": Architecture("Gemma3ForCausalLM", {**TEXT, "sliding_window": 8}),
    "phi3": Architecture("Phi3ForCausalLM", TEXT),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {
            "vocab_size": 260,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", NO_HEADS),
    "opt": Architecture(
        "OPTForCausalLM", {**NO_HEADS, "ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.2}
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        {"vocab_size": 260, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    ),
    "falcon": Architecture("FalconForCausalLM", {**NO_HEADS, "bos_token_id": 1, "eos_token_id": 2}),
    "mixtral": Architecture("MixtralForCausalLM", {**TEXT, "num_local_experts": 4}),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", {**TEXT, **ROUTED_EXPERTS}),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", LATENT),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "mamba": Architecture("MambaForCausalLM", {**MAMBA, "state_size": 8, "time_step_rank": 4}),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        {**MAMBA, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_mamba": Architecture(
        "FalconMambaForCausalLM", {**MAMBA, "state_size": 8, "time_step_rank": 4}
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        {
            **TEXT,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": Architecture("BambaForCausalLM", {**TEXT, **SSM, "attn_layer_indices": [1]}),
    "recurrent_gemma": Architecture(
        "RecurrentGemmaForCausalLM",
        {
            **TEXT,
            "lru_width": 32,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
            "w_init_variance_scale": 0.5,
        },
    ),
    "lfm2": Architecture("Lfm2ForCausalLM", {**TEXT, "layer_types": ["conv", "full_attention"]}),
    "zamba2": Architecture(
        "Zamba2ForCausalLM",
        {
            **HALF,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "mamba_expand": 2,
            "chunk_size": 8,
            "attention_hidden_size": 64,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": False,
            "adapter_rank": 4,
        },
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        {
            "vocab_size": 260,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "initializer_factor": 1.0,
        },
        both_texts,
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        {**ENCODER_DECODER, "max_position_embeddings": 64},
        both_texts,
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 16},
        speech,
    ),
    "bert": Architecture("BertModel", NO_HEADS),
    "bert_mlm": Architecture("BertForMaskedLM", NO_HEADS),
    "roberta": Architecture("RobertaForSequenceClassification", {**NO_HEADS, "pad_token_id": 1}),
    "modernbert": Architecture(
        "ModernBertModel", {**NO_HEADS, "global_attn_every_n_layers": 2, "local_attention": 8}
    ),
    "albert": Architecture("AlbertModel", {**NO_HEADS, "embedding_size": 16}),
    "deberta": Architecture(
        "DebertaModel",
        {
            **NO_HEADS,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "type_vocab_size": 0,
        },
    ),
    "deberta_v2": Architecture(
        "DebertaV2Model",
        {
            **NO_HEADS,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "type_vocab_size": 0,
        },
    ),
    "vit": Architecture("ViTForImageClassification", VISION, pixels),
    "dinov2": Architecture("Dinov2Model", VISION, pixels),
    "clip": Architecture("CLIPModel", TOWERS, texts_and_images),
    "siglip": Architecture("SiglipModel", TOWERS, texts_and_images),
    "siglip_vision": Architecture("SiglipVisionModel", VISION, pixels),
    "wav2vec2": Architecture(
        "Wav2Vec2Model",
        {
            **NO_HEADS,
            "conv_dim": [8, 8],
            "conv_kernel": [10, 3],
            "conv_stride": [5, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        waves,
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_id": 259,
        },
        texts_with_images,
    ),
    "qwen2_5_vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [1, 1, 2],
                    "rope_theta": 10000.0,
                },
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "window_size": 8,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
                "initializer_range": 0.2,
            },
            "image_token_id": 259,
        },
        text_with_patches,
    ),
}
