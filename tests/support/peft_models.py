"""Tiny random models of several architectures, adapters of them that peft writes, and peft's output."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "vocab_size": 60, "intermediate_size": 48, "num_key_value_heads": 2}
ENCODER = {**SIZES, "vocab_size": 60, "intermediate_size": 48, "max_position_embeddings": 40}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEQ2SEQ = {"d_model": 32, "vocab_size": 60, "decoder_start_token_id": 0}
IMAGE = {"pixel_values": (2, 3, 16, 16)}

# The name of a model -> the prefix and the class of transformers, settings, and its inputs.
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", DECODER | SPECIAL, {}),
    "llama-tied": ("Llama", "ForCausalLM", DECODER | SPECIAL | {"tie_word_embeddings": True}, {}),
    "llama-bias": ("Llama", "ForCausalLM", DECODER | {"attention_bias": True}, {}),
    "llama-classifier": ("Llama", "ForSequenceClassification", DECODER | SPECIAL, {}),
    "qwen2": ("Qwen2", "ForCausalLM", DECODER, {}),
    "qwen3": ("Qwen3", "ForCausalLM", DECODER | {"head_dim": 8}, {}),
    "gemma3": ("Gemma3", "ForCausalLM", DECODER | SPECIAL | {"head_dim": 8}, {}),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4},
        {},
    ),
    "bert": ("Bert", "ForSequenceClassification", ENCODER | {"num_labels": 3}, {}),
    "roberta": ("Roberta", "ForSequenceClassification", ENCODER | SPECIAL | {"num_labels": 3}, {}),
    "modernbert": (
        "ModernBert",
        "ForSequenceClassification",
        ENCODER | SPECIAL | {"num_labels": 3, "cls_token_id": 1, "sep_token_id": 2},
        {},
    ),
    "vit": (
        "ViT",
        "ForImageClassification",
        SIZES | {"intermediate_size": 48, "image_size": 16, "patch_size": 8, "num_labels": 3},
        IMAGE,
    ),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        SEQ2SEQ | {"d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
        {"decoder_input_ids": (2, 5)},
    ),
    "whisper": (
        "Whisper",
        "ForConditionalGeneration",
        SEQ2SEQ
        | SPECIAL
        | {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        | {"num_mel_bins": 8, "max_source_positions": 20, "suppress_tokens": None}
        | {"begin_suppress_tokens": None},
        {"input_features": (2, 8, 40), "decoder_input_ids": (2, 5)},
    ),
}


def make_base(folder: Path, name: str) -> Any:
    """Write a random base, and return the class of transformers that loads it."""
    import transformers

    prefix, suffix, settings, _ = MODELS[name]
    special = {key: value for key, value in settings.items() if key.endswith("token_id")}
    torch.manual_seed(zlib.crc32(name.encode()))
    config = (getattr(transformers, f"{prefix}{text}Config", None) for text in ("Text", ""))
    config = next(filter(None, config))(**settings)
    kind = getattr(transformers, prefix + suffix)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.config.update(special)
    model.save_pretrained(folder)
    return kind


def make_adapter(
    kind: Any, base: Path, folder: Path, seed: int = 0, rows: int = 0, **config: Any
) -> None:
    """Write an adapter with random trained weights, as peft's save_pretrained writes it."""
    model = kind.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    made = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 6} | config))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
    made.save_pretrained(folder)


def run(name: str, model: Any) -> torch.Tensor:
    """Return the logits of a model on fixed inputs of its kind."""
    random = torch.Generator().manual_seed(7)
    shapes = MODELS[name][3] or {"input_ids": (2, 9)}
    if "decoder_input_ids" in shapes and len(shapes) == 1:
        shapes = {"input_ids": (2, 9), **shapes}
    inputs = {
        key: torch.randint(3, 60, shape, generator=random)
        if key.endswith("ids")
        else torch.randn(shape, generator=random)
        for key, shape in shapes.items()
    }
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def run_peft(name: str, kind: Any, base: Path, adapter: Path, rows: int = 0) -> torch.Tensor:
    """Return the logits of the base with an adapter, as peft loads it."""
    model = kind.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return run(name, PeftModel.from_pretrained(model, adapter))
