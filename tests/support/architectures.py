"""Tiny random models of many architectures: one table for the tests and for the page in the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WORDS = 260  # The tokenizer of `write_tokenizer` uses the first 131.
IMAGE = 259  # The token that stands for a part of an image.
TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
HALF = {**TEXT, "num_key_value_heads": 4}
NO_HEADS = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
LATENT = {
    **HALF,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
LOCAL_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
MAMBA = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "state_size": 8,
}
SSM = {
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
GPT2 = {
    "vocab_size": WORDS,
    "n_positions": 256,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": WORDS,
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
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
WHISPER = {
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
MODERN = {**NO_HEADS, "global_attn_every_n_layers": 2, "local_attention": 8}
DEBERTA = {
    **NO_HEADS,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "type_vocab_size": 0,
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
TOWERS = {"text_config": NO_HEADS, "vision_config": VISION}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "in_channels": 3,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 8,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
    "initializer_range": 0.2,
}
MULTIMODAL_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
LABELS = {
    "id2label": {0: "red", 1: "green", 2: "blue"},
    "label2id": {"red": 0, "green": 1, "blue": 2},
}
FUSED = ("experts.gate_up_proj", "experts.down_proj")
Inputs = dict[str, torch.Tensor]


def draw_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    """Random token ids `[rows, length]` without padding."""
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(3))


def text() -> Inputs:
    """Two texts."""
    return {"input_ids": draw_ids()}


def seq2seq() -> Inputs:
    """Two texts for an encoder, and longer ones for its decoder."""
    return {"input_ids": draw_ids(), "decoder_input_ids": draw_ids(2, 15)}


def images() -> Inputs:
    """Two images."""
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))}


def speech() -> Inputs:
    """Two spectrograms for an encoder, and texts for its decoder."""
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(4))
    return {"input_features": features, "decoder_input_ids": draw_ids(2, 5)}


def waves() -> Inputs:
    """Two waveforms."""
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(4))}


def texts_and_images() -> Inputs:
    """Three texts, which end with EOS, and two images."""
    words = draw_ids(3, 7)
    words[:, -1] = 1
    return {"input_ids": words, **images()}


def texts_with_images() -> Inputs:
    """Two texts with four placeholders for the patches of their images."""
    words = draw_ids()
    words[:, 1:5] = IMAGE
    return {"input_ids": words, **images()}


def texts_with_patches() -> Inputs:
    """Two texts with four placeholders for sixteen patches of one image each."""
    words = draw_ids()
    words[:, 1:5] = IMAGE
    patches = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": words,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (words == IMAGE).int(),
    }


@dataclass(frozen=True)
class Architecture:
    """A tiny random model of one architecture.

    Attributes:
        model: The class of transformers.
        settings: The settings of its configuration; nested ones are those of its parts.
        inputs: A function that returns inputs of the model.
        label: The name of its row in the docs; nothing if it has none.
        task: What an example is: `text`, `image`, or nothing if no reader can score it.
        strip: The prefix that the published files lack.
        targets: The `target_modules` of the adapters.
        parameters: The `target_parameters` of the adapters.
        slow: Whether only the whole table has it.
        again: Whether another row has the same model, and this one other files or adapters.
    """

    model: str
    settings: dict[str, Any]
    inputs: Callable[[], Inputs] = text
    label: str = ""
    task: str = "text"
    strip: str = ""
    targets: str | list[str] = "all-linear"
    parameters: tuple[str, ...] = ()
    slow: bool = True
    again: bool = False

    def build(self, **changes: Any) -> Any:
        """Build the model with random weights, in float32 and in eval mode."""
        import transformers

        torch.manual_seed(0)
        kind: Any = getattr(transformers, self.model)
        model = kind(kind.config_class(**deepcopy(self.settings) | changes)).eval()
        _compute_eagerly(model)
        with torch.no_grad():  # Weights that start as zero or equal would hide faults.
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape) * 0.05
        return model

    def save(self, folder: Path) -> Path:
        """Save the model as it is published, with a tokenizer of single characters."""
        self.build().save_pretrained(folder)
        if self.strip:
            file = folder / "model.safetensors"
            state = {n.removeprefix(self.strip): t for n, t in load_file(file).items()}
            save_file(state, file, metadata={"format": "pt"})
        if self.task != "image" or self.model in ("CLIPModel", "SiglipModel"):
            write_tokenizer(folder)
        return folder

    def load(self, folder: Path) -> Any:
        """Load a saved model with transformers alone, in float64."""
        import transformers

        model = getattr(transformers, self.model).from_pretrained(folder).eval().double()
        _compute_eagerly(model)
        return model


def _compute_eagerly(model: Any) -> None:
    """Let a mixture of experts compute without grouped products, which have no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(128))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


QWEN_VL = {
    "text_config": {**TEXT, "rope_parameters": MULTIMODAL_ROPE},
    "image_token_id": IMAGE,
    "vision_start_token_id": 257,
    "vision_end_token_id": 258,
    "tie_word_embeddings": False,
}

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", TEXT, label="Llama", slow=False),
    "qwen2": Architecture("Qwen2ForCausalLM", TEXT, label="Qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", TEXT, label="Qwen3"),
    "gemma2": Architecture("Gemma2ForCausalLM", {**TEXT, "sliding_window": 8}, label="Gemma 2"),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", {**TEXT, "sliding_window": 8}, label="Gemma 3 (text)"
    ),
    "gemma3_multimodal": Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": 257,
            "eoi_token_index": 258,
            "text_config": TEXT,
            "vision_config": VISION,
        },
        texts_with_images,
        label="Gemma 3 (multimodal)",
    ),
    "phi3": Architecture("Phi3ForCausalLM", TEXT, label="Phi-3"),
    "gpt2": Architecture("GPT2LMHeadModel", GPT2, label="GPT-2"),
    "gpt2_published": Architecture(
        "GPT2LMHeadModel",
        GPT2,
        label="GPT-2, as published",
        strip="transformer.",
        slow=False,
        again=True,
    ),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", NO_HEADS, label="GPT-NeoX"),
    "opt": Architecture(
        "OPTForCausalLM",
        {**NO_HEADS, "ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.2},
        label="OPT",
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        label="BLOOM, as published",
        strip="transformer.",
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        {**NO_HEADS, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        label="Falcon",
    ),
    "falcon_alibi": Architecture("FalconForCausalLM", {**NO_HEADS, "alibi": True}),
    "mixtral": Architecture("MixtralForCausalLM", {**TEXT, **LOCAL_EXPERTS}, label="Mixtral"),
    "mixtral_experts": Architecture(
        "MixtralForCausalLM",
        {**TEXT, **LOCAL_EXPERTS},
        label="Mixtral, experts adapted",
        targets=["q_proj", "v_proj"],
        parameters=FUSED,
        slow=False,
        again=True,
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        {**TEXT, **MIXTURE, "shared_expert_intermediate_size": 24},
        label="Qwen2-MoE",
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        {**TEXT, **MIXTURE},
        label="Qwen3-MoE, experts adapted",
        targets=["q_proj", "v_proj"],
        parameters=FUSED,
    ),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", LATENT, label="DeepSeek-V3"),
    "deepseek_v3_experts": Architecture(
        "DeepseekV3ForCausalLM",
        LATENT,
        label="DeepSeek-V3, experts adapted",
        targets=["o_proj"],
        parameters=FUSED,
        again=True,
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        {**TEXT, **LOCAL_EXPERTS, "sliding_window": 8},
        label="GPT-OSS, experts adapted",
        targets=["q_proj", "v_proj"],
        parameters=FUSED,
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        {**MAMBA, "time_step_rank": 4},
        label="Mamba",
        targets=["in_proj", "x_proj", "dt_proj"],
        slow=False,
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_mamba": Architecture("FalconMambaForCausalLM", {**MAMBA, "time_step_rank": 4}),
    "jamba": Architecture(
        "JambaForCausalLM",
        {
            **TEXT,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        label="Jamba",
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
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "initializer_factor": 1.0,
        },
        seq2seq,
        label="T5",
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        {**ENCODER_DECODER, "max_position_embeddings": 256},
        seq2seq,
        label="BART",
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {**ENCODER_DECODER, **WHISPER},
        speech,
        label="Whisper",
        task="",
    ),
    "bert": Architecture("BertModel", NO_HEADS, label="BERT"),
    "bert_mlm": Architecture("BertForMaskedLM", NO_HEADS),
    "roberta_bare": Architecture("RobertaModel", NO_HEADS, label="RoBERTa"),
    "modernbert": Architecture("ModernBertModel", MODERN, label="ModernBERT"),
    "bert_classifier": Architecture(
        "BertForSequenceClassification", {**NO_HEADS, **LABELS}, label="BERT classifier"
    ),
    "roberta": Architecture(
        "RobertaForSequenceClassification", {**NO_HEADS, **LABELS}, label="RoBERTa classifier"
    ),
    "modernbert_classifier": Architecture(
        "ModernBertForSequenceClassification", {**MODERN, **LABELS}, label="ModernBERT classifier"
    ),
    "llama_classifier": Architecture(
        "LlamaForSequenceClassification", {**TEXT, **LABELS}, label="Llama classifier"
    ),
    "albert": Architecture("AlbertModel", {**NO_HEADS, "embedding_size": 16}),
    "deberta": Architecture("DebertaModel", DEBERTA),
    "deberta_v2": Architecture("DebertaV2Model", DEBERTA),
    "vit": Architecture(
        "ViTForImageClassification",
        {**VISION, **LABELS},
        images,
        label="ViT classifier",
        task="image",
        slow=False,
    ),
    "dinov2_classifier": Architecture(
        "Dinov2ForImageClassification",
        {**VISION, **LABELS},
        images,
        label="DINOv2 classifier",
        task="image",
    ),
    "dinov2": Architecture("Dinov2Model", VISION, images, label="DINOv2", task=""),
    "clip": Architecture(
        "CLIPModel",
        {**TOWERS, "projection_dim": 16},
        texts_and_images,
        label="CLIP",
        task="image",
    ),
    "siglip": Architecture("SiglipModel", TOWERS, texts_and_images, label="SigLIP", task="image"),
    "siglip_vision": Architecture("SiglipVisionModel", VISION, images),
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
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        texts_with_images,
        label="LLaVA",
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        {
            **QWEN_VL,
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "patch_size": 4,
            },
        },
        texts_with_patches,
        label="Qwen2-VL",
    ),
    "qwen2_5_vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        {**QWEN_VL, "vision_config": QWEN_VISION},
        texts_with_patches,
        label="Qwen2.5-VL",
        slow=False,
    ),
}
BY_LABEL = {one.label: one for one in ARCHITECTURES.values() if one.label}
ROWS = tuple(BY_LABEL.values())  # The rows of the page in the docs, in its order.


def compute(model: Any, inputs: Inputs) -> torch.Tensor:
    """Everything that a model returns, as one row of numbers in float64."""
    given = {
        name: x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**given)
    parts = [v for v in _flatten(list(found.values())) if v.is_floating_point()]
    return torch.cat([part.double().flatten() for part in parts])


def _flatten(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _flatten(value)
    elif isinstance(values, dict):
        yield from _flatten(list(values.values()))


def make_adapters(one: Architecture, base: Path, folder: Path) -> Any:
    """Write two random LoRAs as peft does, to `a` and `b`; return the model that peft merges of them."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=one.targets,
        target_parameters=list(one.parameters) or None,
        fan_in_fan_out=one.model.startswith("GPT2"),
    )
    made = get_peft_model(one.load(base), config, "a")
    made.add_adapter("b", config)
    random = torch.Generator().manual_seed(7)
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=random) * 0.2).double()
    made.save_pretrained(folder, save_embedding_layers=False)
    for name in ("a", "b"):
        file = folder / name / "adapter_model.safetensors"
        stored = {n: t.float() for n, t in load_file(file).items()}
        save_file(stored, file, metadata={"format": "pt"})
    for module in made.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {adapter: scale / 2 for adapter, scale in module.scaling.items()}
    # Beside the module, peft's adapters have no effect where a weight is read without a call.
    return made.merge_and_unload(adapter_names=["a", "b"]).eval()


def measure_difference(model: Any, right: torch.Tensor, inputs: Inputs) -> float:
    """The largest difference to the right outputs, relative to the largest of these."""
    found = compute(model, inputs)
    assert found.shape == right.shape
    return float((found - right).abs().max() / right.abs().max())
