"""Prompts and choices as token ids: special tokens, boundaries, windows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert, tiny_llama
from experthub.hub.bases.base import read
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.errors import UsageError
from experthub.hub.readers.tokens import encode, read_texts, tokenise, tokenise_prompt
from experthub.hub.readers.window import Window
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS = 0, 1
SPECIAL = ["<s>", "</s>", "<unk>"]
MERGES = [(":", "Ġ"), (":Ġ", "y"), ("Ġ", "n"), ("n", "o"), ("e", "s")]


def wrap(kind: str, sides: str) -> Any:
    """A tokenizer of a kind, with BOS in front (`b`) and EOS behind (`e`) of every text."""
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {c: i for i, c in enumerate([*SPECIAL, *alphabet, *map("".join, MERGES)])}
        made = Tokenizer(models.BPE(vocabulary, merges=MERGES))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    elif kind == "metaspace":  # as converted from SentencePiece: a space in front of every text
        letters = ["▁", *map(chr, range(33, 127)), "▁n", "▁no", "é"]
        vocabulary = {c: i for i, c in enumerate([*SPECIAL, *letters])}
        made = Tokenizer(
            models.BPE(vocabulary, merges=[("▁", "n"), ("▁n", "o")], unk_token="<unk>")
        )
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Metaspace()
    else:
        letters = [*map(chr, range(32, 127)), "é", "\n"]
        vocabulary = {c: i for i, c in enumerate([*SPECIAL, *letters])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        made.decoder = decoders.Fuse()
    if sides:
        form = " ".join(["<s>"] * ("b" in sides) + ["$A"] + ["</s>"] * ("e" in sides))
        made.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class Slow:
    """A tokenizer that tells neither offsets nor which tokens are special."""

    is_fast = False
    bos_token_id, eos_token_id, sep_token_id = BOS, EOS, None

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __call__(self, texts: Any, **options: Any) -> Any:
        return self.fast(texts, **options)


PROMPTS = ["Go:", "Go: ", "Is é so?\nAnswer:", "", " ", "a</s>b"]
CHOICES = [" yes", " no", " now", " y", " n"]
KINDS = list(itertools.product(["bytes", "metaspace", "letters"], ["", "b", "e", "be"]))


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("kind", "sides"), KINDS)
def test_a_choice_has_all_of_its_text_and_no_special_token(
    kind: str, sides: str, slow: bool
) -> None:
    fast = wrap(kind, sides)
    tokenizer = Slow(fast) if slow else fast
    for prompt in PROMPTS:
        items = encode(tokenizer, prompt, CHOICES)
        pairs = [(item.prompt, choice) for item in items for choice in item.choices]
        assert len(pairs) == len(CHOICES)
        for (before, choice), text in zip(pairs, CHOICES, strict=True):
            own = tuple(fast(prompt + text, add_special_tokens=False)["input_ids"])
            lead = before[: len(before) + len(choice) - len(own)]
            # BOS is in front if the tokenizer puts it there, or if nothing else is.
            assert lead == ((BOS,) if "b" in sides or len(choice) == len(own) else ())
            assert (before + choice)[len(lead) :] == own
            after = (prompt[len(prompt.rstrip()) :] + text).strip()
            assert fast.decode(choice).strip().endswith(after)
            # Only a token that spans the boundary brings text of the prompt with it.
            spans = (
                kind == "bytes"
                and prompt.strip().endswith(":")
                and fast.decode(choice).startswith(":")
            )
            assert fast.decode(choice).strip() == after or spans


def test_a_token_across_the_boundary_belongs_to_the_choice() -> None:
    tokenizer = wrap("bytes", "be")
    (one, two) = encode(tokenizer, "Go:", [" yes", "no"])
    assert [tokenizer.decode(c) for item in (one, two) for c in item.choices] == [": yes", "no"]
    assert tokenizer.decode(one.prompt) == "<s>Go" and tokenizer.decode(two.prompt) == "<s>Go:"


def test_equal_prompts_are_one_item() -> None:
    (item,) = encode(wrap("letters", "be"), "ab:", [" c", " cd"])
    assert item.prompt[0] == BOS and EOS not in item.prompt
    assert [len(choice) for choice in item.choices] == [2, 3]


def test_special_tokens_in_a_text_are_its_own() -> None:
    tokenizer = wrap("letters", "be")
    (found,) = read_texts(tokenizer, ["</s>"])
    assert (found.before, found.own, found.behind) == ((BOS,), (EOS,), (EOS,))
    (empty,) = read_texts(tokenizer, [""])
    assert (empty.before, empty.own, empty.behind) == ((BOS,), (), (EOS,))
    assert (
        tokenise_prompt(tokenizer, "a")[:1] == (BOS,) and len(tokenise_prompt(tokenizer, "a")) == 2
    )
    assert tokenise_prompt(tokenizer, "a", special=False) == tokenise_prompt(tokenizer, "a")[1:]


def test_an_empty_prompt_needs_a_token_to_begin_with() -> None:
    tokenizer = wrap("letters", "")
    assert encode(tokenizer, "", [" a"])[0].prompt == (BOS,)
    tokenizer.bos_token = None
    assert encode(tokenizer, " ", [" a"])[0].prompt == (EOS,)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="neither BOS nor EOS"):
        encode(tokenizer, "", [" a"])
    with pytest.raises(UsageError, match="has no tokens"):
        encode(tokenizer, "", [""])


class TestWindow:
    def test_a_prompt_loses_its_first_tokens_but_not_bos(self) -> None:
        tokenizer, said = wrap("letters", "be"), []
        window = Window(6, "tiny", report=lambda text, *_: said.append(text))
        (item,) = encode(tokenizer, "abcdefgh:", [" x", " yz"], window)
        assert tokenizer.decode(item.prompt) == "<s>gh:"  # 4 and 2 of the choice are read
        assert tokenizer.decode(tokenise_prompt(tokenizer, "abcdefgh", window, new=2)) == "<s>fgh"
        assert len(said) == 1 and "'abcdefgh:'... has 12 tokens" in said[0]
        assert tokenizer.decode(tokenise(tokenizer, "abcdefgh", window)) == "<s>abcd</s>"

    def test_refused(self) -> None:
        tokenizer, window = wrap("letters", "be"), Window(6, "tiny", "refuse")
        for read_text in (tokenise, tokenise_prompt):
            with pytest.raises(UsageError, match="tiny reads at most 6"):
                read_text(tokenizer, "abcdefgh", window)
        with pytest.raises(UsageError, match="to follow a text"):
            tokenise_prompt(tokenizer, "ab", Window(6, "tiny"), new=6)

    def test_the_limit_is_the_model_s(self, tmp_path: Path) -> None:
        from experthub.hub.readers.window import find_limit
        from transformers import RobertaConfig, RobertaModel, T5Config

        small = RobertaConfig(
            vocab_size=132, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=20, pad_token_id=1,
        )  # fmt: skip
        folder = tiny_bert(tmp_path / "base")
        torch.manual_seed(0)
        RobertaModel(small).save_pretrained(folder)
        base = read(folder, "base")
        assert Window.of(base).size == 18
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
        base = read(folder, "base")
        assert Window.of(base).size == 9
        assert Window.of(read(tiny_llama(tmp_path / "llama"), "l")).size == 512
        assert find_limit(T5Config(n_positions=512), []) == 512
        assert len(tokenise(load_tokenizer(base), "x" * 40, Window.of(base))) == 9
