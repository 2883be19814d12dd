"""Generation against transformers alone, and errors of forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_expert, run_hub, tiny_bert, tiny_llama
from experthub import hub
from experthub.hub.bases.base import read
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.composition.generation import generate_text, read_prompt
from experthub.hub.errors import HubError, UsageError
from experthub.hub.readers import logprobs
from experthub.hub.readers.likelihood import encode, score_choices
from experthub.hub.readers.similarity import embed
from experthub.hub.training.output_layer import OutputLayer

LETTERS = list(map(chr, range(32, 127)))


def letters(folder: Path, form: str = "$A") -> None:
    """A tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=104, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]  # a random model that writes text
    model.save_pretrained(folder)


def bart(folder: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    config = BartConfig(
        vocab_size=104, d_model=32, max_position_embeddings=64, init_std=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sides.items()},
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize("way", ["merge", "route"])
@pytest.mark.parametrize(("make", "targets"), [(t5, ("q", "v")), (bart, ("q_proj", "v_proj"))])
def test_an_encoder_decoder_writes_its_whole_answer(
    make: Callable[[Path], None], targets: tuple[str, ...], way: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    make(tmp_path / "base")
    letters(tmp_path / "base", "$A </s>")
    expert = make_expert(tmp_path / "e", tmp_path / "base", 1, targets=targets, size=0.1)
    method = {"method": "linear" if way == "merge" else "uniform"}
    recipe = {"base": str(tmp_path / "base"), "experts": [str(expert)], way: method}
    composition = hub.compose(recipe)
    tokenizer = load_tokenizer(composition.plan.base)
    for prompt in ("translate this to French now", "hi"):
        given = tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = composition.model.generate(input_ids=given, max_new_tokens=9, do_sample=False)[0]
        text = generate_text(composition, prompt, max_new_tokens=9)
        assert text == tokenizer.decode(wanted, skip_special_tokens=True) and text


def test_the_prompt_does_not_end_with_eos(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base")
    letters(folder, "<s> $A </s>")
    base = read(folder, "base")
    tokenizer = load_tokenizer(base)
    assert read_prompt(base, tokenizer, "ab") == tokenizer("ab")["input_ids"][:-1]


def test_a_long_prompt_is_cut_or_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=104, n_positions=48, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    letters(tmp_path / "base", "<s> $A")
    expert = make_expert(
        tmp_path / "e",
        tmp_path / "base",
        1,
        targets=("attn.c_proj",),
        gates=False,
        fan_in_fan_out=True,
    )
    recipe = {"base": str(tmp_path / "base"), "experts": [str(expert)]}
    composition = hub.compose(recipe | {"merge": {"method": "task_arithmetic", "scale": 0.0}})
    said: list[str] = []
    text = generate_text(
        composition, "x" * 60 + "abc", max_new_tokens=8, report=lambda t, *_: said.append(t)
    )
    assert ["has 72 tokens" in t and "reads at most 48" in t for t in said] == [True]
    ids = torch.tensor(
        [[1, *load_tokenizer(composition.plan.base)("x" * 36 + "abc")["input_ids"][1:]]]
    )
    wanted = load_model(composition.plan.base, "float32", None).generate(
        ids, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert text == load_tokenizer(composition.plan.base).decode(
        wanted[0, 40:], skip_special_tokens=True
    )
    with pytest.raises(UsageError, match="has 72 tokens"):
        generate_text(composition, "x" * 60 + "abc", max_new_tokens=8, long="refuse")
    with pytest.raises(UsageError, match="48 tokens are to follow"):
        generate_text(composition, "x", max_new_tokens=48)


@pytest.fixture
def smear(base_folder: Path, expert_folder: Callable[..., Path]) -> Any:
    """A route that chooses once for every example."""
    experts = [str(expert_folder(e)) for e in range(3)]
    route = {"method": "smear"}
    return hub.compose({"base": str(base_folder), "experts": experts, "route": route})


def test_guessed_tokens_do_not_choose_the_experts(smear: Any) -> None:
    ids = torch.tensor([[65, 66, 67, 65, 66, 68, 65, 66]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = smear.model.generate(ids, **settings)
    assert torch.equal(smear.model.generate(ids, prompt_lookup_num_tokens=3, **settings), plain)
    model = smear.detach()
    assert "generate" not in vars(model)


def test_prompts_choose_the_experts_where_whole_texts_are_read(
    smear: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(smear.plan.base)
    questions = [("one", [" a", " bb", " c d e"]), ("a longer prompt", [" x", " yy"])]
    items = [item for prompt, choices in questions for item in encode(tokenizer, prompt, choices)]
    cached = score_choices(smear.model, items)
    monkeypatch.setattr(logprobs, "shares_prompts", lambda _: False)
    for row, wanted in zip(score_choices(smear.model, items), cached, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


def test_an_error_of_a_forward_pass_is_one_sentence(
    base_folder: Path, tiny_task: str, expert_folder: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from transformers import BertModel, LlamaModel

    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("unsupported operand: 'str' and 'int'")

    monkeypatch.setattr(LlamaModel, "forward", fail)
    monkeypatch.setattr(BertModel, "forward", fail)
    route = tmp_path / "r.yaml"
    route.write_text(
        f"base: {base_folder}\nexperts: [{expert_folder(1)}]\nroute: {{method: uniform}}\n"
    )
    for words in (["eval", route, "-t", tiny_task], ["trace", route, "-p", "x"],
                  ["generate", route, "--prompt", "x"]):  # fmt: skip
        ran = run_hub(*words)
        (error,) = ran.lines("error: ")
        assert ran.code == 1 and "TypeError: unsupported operand" in error
        assert str(base_folder) in error and "config.json" in ran.lines("hint: ")[0]
    encoder = read(tiny_bert(tmp_path / "bert"), "bert")
    with pytest.raises(HubError, match="transformers cannot run it: TypeError"):
        embed(load_model(encoder, "float32", None), load_tokenizer(encoder), ["a"])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM"])
def test_training_computes_the_model_s_own_logits(name: str) -> None:
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(
        kind.config_class(
            vocab_size=104, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.5,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).train()  # fmt: skip
    ids = torch.randint(3, 100, (2, 7))
    chosen = torch.zeros(2, 7, dtype=torch.bool)
    chosen[0, 3:5] = chosen[1, 6] = True
    found = OutputLayer().compute_logits(model, {"input_ids": ids}, chosen)
    torch.testing.assert_close(found, model(input_ids=ids).logits[chosen], rtol=1e-5, atol=1e-5)
    assert model.training


def test_beams_that_the_base_asks_for_are_noted(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    make_expert(tmp_path / "expert", base, 1)
    recipe = {
        "base": str(base),
        "experts": [str(tmp_path / "expert")],
        "merge": {"method": "linear"},
    }
    wanted = generate_text(hub.compose(recipe), "The sky", max_new_tokens=5)
    (base / "generation_config.json").write_text('{"num_beams": 4, "eos_token_id": 257}')
    notes: list[str] = []
    found = generate_text(
        hub.compose(recipe),
        "The sky",
        max_new_tokens=5,
        report=lambda what, *_: notes.append(what),
    )
    assert found == wanted
    assert len(notes) == 1 and "asks for 4 beams" in notes[0]
