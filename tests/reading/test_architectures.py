"""Log-probabilities of choices against a plain forward pass of one text at a time, by architecture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as T
from experthub.hub.readers import logprobs
from experthub.hub.readers.batching import read_all
from experthub.hub.readers.logprobs import shares_prompts, sum_logprobs
from experthub.hub.readers.reader import pad
from experthub.hub.readers.text import TokenRow
from experthub.hub.readers.tokens import Encoded
from transformers import cache_utils

V = 104
IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
SIZE["initializer_range"] = 0.3
LLAMA = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
HEAD = {**LLAMA, "head_dim": 8}
BERT = {**SIZE, "intermediate_size": 48, "max_position_embeddings": 64, "is_decoder": True}
SSM = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
MODERN = {**SIZE, "intermediate_size": 48, "local_attention": 8, "num_hidden_layers": 3}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Bases whose prompts are read once, with a cache that every choice continues.
CACHED: dict[str, Callable[[], Any]] = {
    "GPT2LMHeadModel": lambda: T.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **IDS),
    "OPTForCausalLM": lambda: T.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.3,
        **IDS,
    ),
    "BloomForCausalLM": lambda: T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS),
    "MptForCausalLM": lambda: T.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, **IDS),
    "FalconForCausalLM": lambda: T.FalconConfig(alibi=True, new_decoder_architecture=False, **SIZE),
    "GPTNeoXForCausalLM": lambda: T.GPTNeoXConfig(intermediate_size=48, **SIZE),
    "LlamaForCausalLM": lambda: T.LlamaConfig(**LLAMA),
    "MistralForCausalLM": lambda: T.MistralConfig(sliding_window=8, **LLAMA),
    "Phi3ForCausalLM": lambda: T.Phi3Config(**LLAMA),
    "MixtralForCausalLM": lambda: T.MixtralConfig(sliding_window=8, **LLAMA, **EXPERTS),
    "Gemma2ForCausalLM": lambda: T.Gemma2Config(sliding_window=8, **HEAD),
    "Gemma3ForCausalLM": lambda: T.Gemma3TextConfig(sliding_window=8, **HEAD),
    "CohereForCausalLM": lambda: T.CohereConfig(**LLAMA),
    "Qwen3ForCausalLM": lambda: T.Qwen3Config(**HEAD),
    "Llama4ForCausalLM": lambda: T.Llama4TextConfig(
        num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8, **HEAD
    ),
    "BertLMHeadModel": lambda: T.BertConfig(**BERT),
}
# Bases that read every choice together with its prompt.
WHOLE: dict[str, Callable[[], Any]] = {
    "RobertaForCausalLM": lambda: T.RobertaConfig(**{**BERT, "pad_token_id": 1}),
    "BartForCausalLM": lambda: T.BartConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=64, init_std=0.3, is_decoder=True, is_encoder_decoder=False, **IDS
    ),
    "MambaForCausalLM": lambda: T.MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=4, **IDS
    ),
    "Mamba2ForCausalLM": lambda: T.Mamba2Config(
        hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1,
        chunk_size=8, **IDS
    ),
    "FalconMambaForCausalLM": lambda: T.FalconMambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=4, **IDS
    ),
    "RwkvForCausalLM": lambda: T.RwkvConfig(hidden_size=32, num_hidden_layers=2, **IDS),
    "RecurrentGemmaForCausalLM": lambda: T.RecurrentGemmaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        lru_width=32, attention_window_size=8, **IDS
    ),
    "Lfm2ForCausalLM": lambda: T.Lfm2Config(layer_types=["conv", "full_attention"], **LLAMA),
    "FalconH1ForCausalLM": lambda: T.FalconH1Config(
        mamba_d_ssm=32, mamba_n_heads=4, **SSM, **HEAD
    ),
    "GraniteMoeHybridForCausalLM": lambda: T.GraniteMoeHybridConfig(
        layer_types=["mamba", "attention"], mamba_n_heads=8, num_local_experts=0,
        shared_intermediate_size=48, **SSM, **LLAMA
    ),
    "Qwen3NextForCausalLM": lambda: T.Qwen3NextConfig(
        layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=0,
        **HEAD
    ),
    "JambaForCausalLM": lambda: T.JambaConfig(
        num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
        use_mamba_kernels=False, **LLAMA
    ),
    "BambaForCausalLM": lambda: T.BambaConfig(
        attn_layer_indices=[1], mamba_n_heads=8, **SSM, **LLAMA
    ),
    "ZambaForCausalLM": lambda: T.ZambaConfig(
        layers_block_type=["hybrid", "hybrid"], n_mamba_heads=2, mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False, **LLAMA
    ),
    "Zamba2ForCausalLM": lambda: T.Zamba2Config(
        layers_block_type=["mamba", "hybrid"], mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8,
        mamba_ngroups=1, chunk_size=8, use_mem_rope=False, num_mem_blocks=1, **LLAMA
    ),
}  # fmt: skip
ITEMS = [
    Encoded((1, 5, 9, 33, 60, 71, 8, 90, 12, 44, 13, 14), ((7,), (8, 9, 10), (8, 9))),
    Encoded((1, 77, 30), ((20, 21, 22, 23), (41,))),
]


def build(name: str, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    config = (CACHED | WHOLE)[name]()
    if attention:
        config._attn_implementation = attention
    model = getattr(T, name)(config).eval()
    for parameter in model.parameters():
        if not bool(torch.isfinite(parameter).all()):  # left empty by the class
            parameter.data.normal_(0, 0.1)
    # The grouped products of fused experts have no float64.
    return model if name == "MixtralForCausalLM" else model.double()


def score_alone(model: Any, prompt: tuple[int, ...], choice: tuple[int, ...]) -> float:
    """One plain forward pass over one text."""
    read = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0].double().log_softmax(-1)
    return sum(float(read[len(prompt) + i - 1, token]) for i, token in enumerate(choice))


@pytest.mark.parametrize("name", [*CACHED, *WHOLE])
@torch.no_grad()
def test_a_batch_is_what_transformers_computes_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    assert shares_prompts(model) == (name in CACHED)
    wanted = [score_alone(model, item.prompt, c) for item in ITEMS for c in item.choices]
    assert sum_logprobs(model, ITEMS).tolist() == pytest.approx(wanted, abs=5e-6)
    # With room for the logits of three positions, every batch is split.
    monkeypatch.setattr(logprobs, "count_positions", lambda _: 3)
    assert sum_logprobs(model, ITEMS).tolist() == pytest.approx(wanted, abs=5e-6)


LONG = {"original_max_position_embeddings": 9, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 5.0]}
BY_LENGTH: dict[str, Callable[[], Any]] = {
    "Phi3ForCausalLM": lambda: T.Phi3Config(
        rope_parameters={"rope_type": "longrope", **FACTORS, **LONG},
        original_max_position_embeddings=9,
        **LLAMA,
    ),
    "LlamaForCausalLM": lambda: T.LlamaConfig(
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        **(LLAMA | {"max_position_embeddings": 16}),
    ),
}


@pytest.mark.parametrize("name", BY_LENGTH)
@torch.no_grad()
def test_positions_that_depend_on_the_longest_text_are_those_of_each_text_alone(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(T, name)(BY_LENGTH[name]()).eval()
    items = [*ITEMS, Encoded((1, 4), ((20,) * 13, (30,)))]
    wanted = [score_alone(model, item.prompt, c) for item in items for c in item.choices]
    assert sum_logprobs(model, items).tolist() == pytest.approx(wanted, abs=5e-5)


WIDE = [Encoded(tuple(range(3, 43)), ((7, 8),)), Encoded((5, 9), ((20, 21, 22), (41,)))]
# The grouped products of fused experts have no float64.
EAGER = [name for name in CACHED if name != "MixtralForCausalLM"]


@pytest.mark.parametrize("name", EAGER)
@torch.no_grad()
def test_padding_without_any_token_to_attend_to_is_not_nan(name: str) -> None:
    """The lowest number of float64 is minus infinity in the float32 of eager attention."""
    model = build(name, attention="eager")
    wanted = [score_alone(model, item.prompt, c) for item in WIDE for c in item.choices]
    assert sum_logprobs(model, WIDE).tolist() == pytest.approx(wanted, abs=5e-6)


class Reads:
    """A reader of the logits of a classifier or of the last hidden state."""

    name, real = "reads", None

    def read(self, model: Any, rows: Sequence[Any]) -> torch.Tensor:
        ids_NT, real_NT = pad([row.tokens for row in rows], "cpu", token=0)
        found = model(input_ids=ids_NT, attention_mask=real_NT.long())
        return found.logits if "logits" in found else found.last_hidden_state[:, 0]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ModernBertModel", T.ModernBertConfig(**MODERN)),
        ("Gemma2ForSequenceClassification", T.Gemma2Config(sliding_window=8, **HEAD)),
        ("Gemma3TextForSequenceClassification", T.Gemma3TextConfig(sliding_window=8, **HEAD)),
        ("MistralForSequenceClassification", T.MistralConfig(sliding_window=8, **LLAMA)),
    ],
)
@torch.no_grad()
def test_padding_behind_a_sliding_window_is_not_nan(name: str, config: Any) -> None:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = getattr(T, name)(config).eval().double()
    rows = [TokenRow(tuple(range(3, 43)), ()), TokenRow((5, 9), ()), TokenRow((8, 7), ())]
    alone = torch.cat([Reads().read(model, [row]) for row in rows])
    torch.testing.assert_close(read_all(Reads(), model, rows), alone, atol=1e-9, rtol=1e-9)


def test_what_is_asked_of_transformers_is_there() -> None:
    """The choice between the two ways reads these."""
    assert isinstance(T.LlamaForCausalLM._is_stateful, bool)
    assert "logits_to_keep" in inspect.signature(T.MambaForCausalLM.forward).parameters
    assert issubclass(cache_utils.DynamicSlidingWindowLayer, cache_utils.DynamicLayer)
