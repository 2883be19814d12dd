"""Tiny random models of many architectures, and what the hub computes of them beside peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WORDS = 131  # The vocabulary of `write_tokenizer`.
LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GROUPED = LLAMA | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
LABELS = {
    "id2label": {0: "red", 1: "green", 2: "blue"},
    "label2id": {"red": 0, "green": 1, "blue": 2},
}
Inputs = dict[str, torch.Tensor]


def _tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, WORDS - 2, (rows, length), generator=random)


def _pixels(side: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def text() -> Inputs:
    return {"input_ids": _tokens()}


def seq2seq() -> Inputs:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(length=5, seed=1)}


def images() -> Inputs:
    return {"pixel_values": _pixels()}


def both() -> Inputs:
    ids = _tokens()
    ids[:, -1] = 1
    return {"input_ids": ids, "pixel_values": _pixels()}


def speech() -> Inputs:
    sound = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(1))
    return {"input_features": sound, "decoder_input_ids": _tokens(length=5)}


def illustrated(token: int, count: int) -> Callable[[], Inputs]:
    """Texts with an image of some tokens."""

    def make() -> Inputs:
        ids = torch.cat([torch.full((2, count), token), _tokens()], 1)
        return {"input_ids": ids, "pixel_values": _pixels()}

    return make


def qwen_image() -> Inputs:
    """Texts with an image of four patches that are merged into one token."""
    ids = torch.cat([torch.tensor([[125, 126, 127]] * 2), _tokens()], 1)
    pixels = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    kinds = (ids == 126).int()
    grid = torch.tensor([[1, 2, 2]] * 2)
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Attributes:
        label: The name in the table.
        model: The class of transformers.
        config: The class of its configuration.
        settings: The settings of the configuration.
        inputs: A function that returns inputs of the model.
        task: What an example is: `text`, `image`, or nothing if no reader can score it.
        strip: The prefix that the published files lack.
        targets: The `target_modules` of the adapters.
        parameters: The `target_parameters` of the adapters.
        slow: Whether only the whole table has it.
    """

    label: str
    model: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[[], Inputs] = text
    task: str = "text"
    strip: str = ""
    targets: str | list[str] = "all-linear"
    parameters: tuple[str, ...] = ()
    slow: bool = True
    nested: dict[str, dict[str, Any]] = field(default_factory=dict)

    def build(self) -> Any:
        """Build the model with random weights."""
        import transformers

        torch.manual_seed(0)
        settings = {**self.settings, **{k: dict(v) for k, v in self.nested.items()}}
        config = getattr(transformers, self.config)(**settings)
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Some models start with zeros, or with weights that are too small to matter.
                if parameter.ndim > 1 and float(parameter.std()) < 0.05:
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
                elif not parameter.any() and "bias" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.05)
        return model

    def save(self, folder: Path) -> Path:
        """Save the model as it is published, with a tokenizer of single characters."""
        self.build().save_pretrained(folder)
        if self.strip:
            file = folder / "model.safetensors"
            state = {n.removeprefix(self.strip): t for n, t in load_file(file).items()}
            save_file(state, file, metadata={"format": "pt"})
        if self.task != "image" or self.model == "CLIPModel":
            write_tokenizer(folder)
        return folder

    def load(self, folder: Path) -> Any:
        """Load a saved model with transformers alone, in float64."""
        import transformers

        model = getattr(transformers, self.model).from_pretrained(folder).eval().double()
        if "MoE" in self.label or "experts" in str(model).lower():
            model.set_experts_implementation("eager")  # The grouped product has no float64.
        return model


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(128))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


MIXTURE = {"num_experts_per_tok": 2}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "in_channels": 3,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
    "window_size": 8,
}
MAMBA = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "time_step_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
T5 = {
    "vocab_size": WORDS,
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}
BART = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "init_std": 0.2,
}
WHISPER = BART | {
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
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
BLOOM = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FALCON = LLAMA | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
OPT = {
    **LLAMA,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
}
DEEPSEEK = LLAMA | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
JAMBA = GROUPED | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
FUSED = ("experts.gate_up_proj", "experts.down_proj")
MULTI = {"tie_word_embeddings": False}
CLIP_TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARCHITECTURES = (
    Architecture("Llama", "LlamaForCausalLM", "LlamaConfig", GROUPED, slow=False),
    Architecture("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    Architecture("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", HEADED),
    Architecture("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", HEADED),
    Architecture("Gemma 3 (text)", "Gemma3ForCausalLM", "Gemma3TextConfig", HEADED),
    Architecture(
        "Gemma 3 (multimodal)",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "mm_tokens_per_image": 4,
            "image_token_index": 126,
            "boi_token_index": 125,
            "eoi_token_index": 127,
        },
        illustrated(126, 4),
        nested={"text_config": HEADED, "vision_config": VISION},
    ),
    Architecture("Phi-3", "Phi3ForCausalLM", "Phi3Config", GROUPED),
    Architecture("GPT-2", "GPT2LMHeadModel", "GPT2Config", GPT2),
    Architecture(
        "GPT-2, as published",
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        strip="transformer.",
        slow=False,
    ),
    Architecture("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", LLAMA),
    Architecture("OPT", "OPTForCausalLM", "OPTConfig", OPT),
    Architecture(
        "BLOOM, as published", "BloomForCausalLM", "BloomConfig", BLOOM, strip="transformer."
    ),
    Architecture("Falcon", "FalconForCausalLM", "FalconConfig", FALCON),
    Architecture(
        "Mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | MIXTURE | {"num_local_experts": 4},
    ),
    Architecture(
        "Mixtral, experts adapted",
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | MIXTURE | {"num_local_experts": 4},
        targets=["q_proj", "v_proj"],
        parameters=FUSED,
        slow=False,
    ),
    Architecture(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        GROUPED
        | MIXTURE
        | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    Architecture(
        "Qwen3-MoE, experts adapted",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        HEADED | MIXTURE | {"num_experts": 4, "moe_intermediate_size": 24},
        targets=["q_proj", "v_proj"],
        parameters=FUSED,
    ),
    Architecture("DeepSeek-V3", "DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    Architecture(
        "DeepSeek-V3, experts adapted",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        DEEPSEEK,
        targets=["o_proj"],
        parameters=FUSED,
    ),
    Architecture(
        "GPT-OSS, experts adapted",
        "GptOssForCausalLM",
        "GptOssConfig",
        HEADED | MIXTURE | {"num_local_experts": 4},
        targets=["q_proj", "v_proj"],
        parameters=FUSED,
    ),
    Architecture(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        MAMBA,
        targets=["in_proj", "x_proj", "dt_proj"],
        slow=False,
    ),
    Architecture("Jamba", "JambaForCausalLM", "JambaConfig", JAMBA),
    Architecture("T5", "T5ForConditionalGeneration", "T5Config", T5, seq2seq),
    Architecture("BART", "BartForConditionalGeneration", "BartConfig", BART, seq2seq),
    Architecture(
        "Whisper", "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, speech, task=""
    ),
    Architecture("BERT", "BertModel", "BertConfig", LLAMA),
    Architecture("RoBERTa", "RobertaModel", "RobertaConfig", LLAMA),
    Architecture("ModernBERT", "ModernBertModel", "ModernBertConfig", LLAMA),
    Architecture("BERT classifier", "BertForSequenceClassification", "BertConfig", LLAMA | LABELS),
    Architecture(
        "RoBERTa classifier", "RobertaForSequenceClassification", "RobertaConfig", LLAMA | LABELS
    ),
    Architecture(
        "ModernBERT classifier",
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        LLAMA | LABELS,
    ),
    Architecture(
        "Llama classifier", "LlamaForSequenceClassification", "LlamaConfig", GROUPED | LABELS
    ),
    Architecture(
        "ViT classifier",
        "ViTForImageClassification",
        "ViTConfig",
        VISION | LABELS,
        images,
        task="image",
        slow=False,
    ),
    Architecture(
        "DINOv2 classifier",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        VISION | LABELS,
        images,
        task="image",
    ),
    Architecture("DINOv2", "Dinov2Model", "Dinov2Config", VISION, images, task=""),
    Architecture(
        "CLIP",
        "CLIPModel",
        "CLIPConfig",
        {"projection_dim": 16},
        both,
        task="image",
        nested={"text_config": CLIP_TEXT, "vision_config": VISION},
    ),
    Architecture(
        "SigLIP",
        "SiglipModel",
        "SiglipConfig",
        {},
        both,
        task="image",
        nested={"text_config": CLIP_TEXT, "vision_config": VISION},
    ),
    Architecture(
        "LLaVA",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"image_token_index": 126, **MULTI},
        illustrated(126, 16),
        nested={
            "text_config": {"model_type": "llama", **GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
    ),
    Architecture(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"image_token_id": 126, "vision_start_token_id": 125, "vision_end_token_id": 127, **MULTI},
        qwen_image,
        slow=False,
        nested={
            "text_config": {
                **GROUPED,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [1, 1, 2],
                    "rope_theta": 10000.0,
                },
            },
            "vision_config": QWEN_VISION,
        },
    ),
)


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
