"""Text classifiers in batches against transformers alone, one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from experthub.hub.readers.text import TextClassifier, TokenRow

V = 104
NAMED = {"vocab_size": V, "num_labels": 3, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {**NAMED, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
BERT = {**SIZE, "intermediate_size": 48, "initializer_range": 0.3}
GPT2 = {**NAMED, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
BART = {
    **NAMED,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.3,
}
MADE: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("Llama", lambda: T.LlamaConfig(**LLAMA, pad_token_id=3)),
    "llama, no padding token": ("Llama", lambda: T.LlamaConfig(**LLAMA, pad_token_id=None)),
    "llama, EOS as padding": ("Llama", lambda: T.LlamaConfig(**LLAMA, pad_token_id=2)),
    "qwen2": ("Qwen2", lambda: T.Qwen2Config(**LLAMA, pad_token_id=3)),
    "mistral": ("Mistral", lambda: T.MistralConfig(**LLAMA, pad_token_id=3)),
    "phi3, long positions": (
        "Phi3",
        lambda: T.Phi3Config(
            **LLAMA,
            pad_token_id=3,
            original_max_position_embeddings=6,
            rope_parameters={
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0, 3.0, 2.0, 5.0],
                "rope_theta": 10000.0,
            },
        ),
    ),
    "gpt2": ("GPT2", lambda: T.GPT2Config(**GPT2, pad_token_id=2)),
    "gpt2, no padding token": ("GPT2", lambda: T.GPT2Config(**GPT2)),
    "bert": ("Bert", lambda: T.BertConfig(**BERT)),
    "roberta": (
        "Roberta",
        lambda: T.RobertaConfig(**BERT, pad_token_id=1, max_position_embeddings=14),
    ),
    "modernbert": ("ModernBert", lambda: T.ModernBertConfig(**LLAMA, pad_token_id=3)),
    "deberta": (
        "DebertaV2",
        lambda: T.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    ),
    "bart": ("Bart", lambda: T.BartConfig(**BART, pad_token_id=3)),
}
# Texts of different lengths, with EOS at the end and one with EOS in between.
TEXTS = [(9, 2), (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 2), (40, 41, 42, 2), (7, 2, 8, 9, 2)]


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_a_batch_is_what_transformers_computes_alone(name: str) -> None:
    architecture, config = MADE[name]
    torch.manual_seed(0)
    kind = getattr(T, f"{architecture}ForSequenceClassification")
    model = kind(config()).eval().double()
    reader = TextClassifier(None, {})
    found = reader.read(model, [TokenRow(text, (0, 1, 2)) for text in TEXTS])
    for row, text in zip(found, TEXTS, strict=True):
        wanted = model(input_ids=torch.tensor([text])).logits[0].float()
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-6)
    assert reader.real is None
