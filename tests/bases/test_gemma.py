"""Gemma 3 270M: its vocabulary is most of the model, and its embeddings are tied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from experthub.hub.bases import base as bases
from experthub.hub.bases.loading import load_model
from experthub.hub.registry.registry import Registry
from experthub.hub.transfer.remotes.pypi import PypiSource


@pytest.mark.slow
def test_a_large_tied_vocabulary_is_within_the_limit_of_sizes(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    )
    transformers.Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(bases.read(tmp_path, "gemma"), "bfloat16", None)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_starter_registry_has_gemma_with_its_terms() -> None:
    name, entry = Registry.read().find_base("google/gemma-3-270m")
    assert name == "gemma-3-270m" and entry.license == "gemma"
    assert entry.terms == "Gemma Terms of Use, https://ai.google.dev/gemma/terms"
    assert entry.sha256 and entry.fingerprint
    places = PypiSource.parse_parts(entry.sources[0])
    assert [place.member.rpartition(".")[2] for place in places] == [
        *(f"part0{number}" for number in range(4)),
        "html",
    ]
