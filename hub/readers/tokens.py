"""Texts as token ids: with special tokens or without, cut to the window, split at a boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from threading import Lock
from typing import Any

from experthub.hub.errors import UsageError
from experthub.hub.readers.window import Window

# A tokenizer stores how it cuts and pads, and fails if another thread reads a text at that moment.
_tokenising = Lock()


@dataclass(frozen=True)
class TextTokens:
    """The token ids of a text.

    Args:
        before: The special tokens that the tokenizer puts in front of every text, such as BOS.
        own: The tokens of the text itself.
        behind: The special tokens that the tokenizer puts behind every text, such as EOS.
        ends: The place in the text, in characters, where each own token ends. None if the
            tokenizer does not tell.
    """

    before: tuple[int, ...]
    own: tuple[int, ...]
    behind: tuple[int, ...]
    ends: tuple[int, ...] | None

    def find(self, boundary: int, prompt: TextTokens) -> int:
        """Find the first own token that reaches beyond a boundary in the text.

        Args:
            boundary: The boundary, in characters.
            prompt: The tokens of the text before the boundary alone. Without `ends`, the text has
                these tokens before the boundary, as far as they are the same.

        Returns:
            The position of the token; the number of own tokens if there is none.
        """
        if not boundary:
            return 0
        if self.ends is None:
            pairs = zip(self.own, prompt.own, strict=False)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return next((i for i, end in enumerate(self.ends) if end > boundary), len(self.own))


def read_texts(tokenizer: Any, texts: Sequence[str]) -> list[TextTokens]:
    """Tokenise texts, and separate the tokens of each text from the special ones around it.

    Args:
        tokenizer: The tokenizer.
        texts: The texts. A special token that is written in a text belongs to the text.

    Returns:
        The tokens of each text.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    more = {"return_special_tokens_mask": True, "return_offsets_mapping": True} if fast else {}
    with _tokenising:
        found = tokenizer(list(texts), verbose=False, **more)
        bare = None if fast else tokenizer(list(texts), add_special_tokens=False, verbose=False)
    rows = []
    for number, ids in enumerate(map(tuple, found["input_ids"])):
        if bare is None:
            mask = found["special_tokens_mask"][number]
            start = next((i for i, special in enumerate(mask) if not special), len(ids))
            size = sum(not special for special in mask)
            ends = tuple(end for _, end in found["offset_mapping"][number][start : start + size])
        else:
            own, ends = tuple(bare["input_ids"][number]), None
            size = len(own)
            places = range(len(ids) - size + 1)
            start = next((i for i in places if size and ids[i : i + size] == own), len(ids))
        if not size:  # Without a text between them, BOS is told from EOS by its id alone.
            last = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id}
            start = next((i for i, token in enumerate(ids) if token in last), len(ids))
        before, behind = ids[:start], ids[start + size :]
        rows.append(TextTokens(before, ids[start : start + size], behind, ends))
    return rows


def tokenise(
    tokenizer: Any, text: str, window: Window | None = None, *, special: bool = True
) -> tuple[int, ...]:
    """Tokenise a text for an encoder or a classifier, with the special tokens on both sides.

    Args:
        tokenizer: The tokenizer of the base.
        text: The text.
        window: The window of the base. Of a text that does not fit, the first tokens are kept, and
            the special tokens. None keeps all tokens.
        special: Whether the tokenizer adds its special tokens.

    Returns:
        The token ids.

    Raises:
        UsageError: The text does not fit, and the window refuses such texts.
    """
    options = {"add_special_tokens": special, "verbose": False}
    with _tokenising:
        ids = tokenizer(text, **options)["input_ids"]
    if window is not None and not window.fits(len(ids), text):
        with _tokenising:
            cut = tokenizer(text, truncation=True, max_length=window.size, **options)
        ids = cut["input_ids"]
    return tuple(ids)


def tokenise_prompt(
    tokenizer: Any, text: str, window: Window | None = None, *, new: int = 0, special: bool = True
) -> tuple[int, ...]:
    """Tokenise a text that a causal language model continues.

    Special tokens that the tokenizer puts behind a text are omitted, because EOS would end the text
    before its continuation.

    Args:
        tokenizer: The tokenizer of the base.
        text: The text.
        window: The window of the base. Of a text that does not fit, the last tokens are kept, and
            the special tokens in front. None keeps all tokens.
        new: The number of tokens that are to follow the text.
        special: Whether special tokens are put in front of the text.

    Returns:
        The token ids.

    Raises:
        UsageError: The text does not fit, and the window refuses such texts or leaves no room.
    """
    (found,) = read_texts(tokenizer, [text])
    before = found.before if special else ()
    return cut_left(before, found.own, new, window, text)


def cut_left(
    before: tuple[int, ...], own: tuple[int, ...], new: int, window: Window | None, text: str
) -> tuple[int, ...]:
    """Keep the last tokens of a text, and the special tokens in front of it.

    Args:
        before: The special tokens in front of the text.
        own: The tokens of the text.
        new: The number of tokens that are to follow the text.
        window: The window of the base; None keeps all tokens.
        text: The text, for messages.

    Returns:
        The token ids.

    Raises:
        UsageError: The text does not fit, and the window refuses such texts or leaves no room.
    """
    size = len(before) + len(own) + new
    if window is None or window.fits(size, text):
        return before + own
    room = (window.size or 0) - len(before) - new
    if room < 1:
        window.refuse(
            f"{new} tokens are to follow a text", "generate fewer tokens, or use shorter choices"
        )
    return before + own[-room:]


@dataclass(frozen=True)
class Encoded:
    """The token ids of a prompt and of its choices, which follow the prompt."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


def encode(
    tokenizer: Any, prompt: str, choices: Sequence[str], window: Window | None = None
) -> list[Encoded]:
    """Tokenise a prompt and its choices.

    Prompt and choice are tokenised together, and the choice has every token that reaches beyond the
    end of the prompt. White space at the end of the prompt belongs to the choice. Special tokens in
    front belong to the prompt, and those behind are omitted. A prompt without any token is BOS, or
    EOS for a tokenizer without BOS, as in lm-evaluation-harness.

    Args:
        tokenizer: The tokenizer of the model.
        prompt: The text before the choices.
        choices: The texts that follow it.
        window: The window of the base. A prompt that does not fit loses its first tokens. None
            keeps all tokens.

    Returns:
        One item for all choices. If a token of a choice reaches into the prompt, so that the
        prompts differ, there is one item per choice instead.

    Raises:
        UsageError: A text does not fit, a choice has no tokens, or the prompt is empty and the
            tokenizer has neither BOS nor EOS.
    """
    kept = prompt.rstrip()
    alone, *whole = read_texts(tokenizer, [kept, *(prompt + choice for choice in choices)])
    found = []
    for choice, text in zip(choices, whole, strict=True):
        if not text.own:
            raise UsageError(
                f"the choice {choice!r} has no tokens", "use a task whose choices have some text"
            )
        # A choice that adds no token has the last one.
        start = min(text.find(len(kept), alone), len(text.own) - 1)
        before = text.before or (() if start else _choose_first(tokenizer))
        found.append((before, text.own[:start], text.own[start:]))
    same = all(one[:2] == found[0][:2] for one in found)
    groups = [found] if same else [[one] for one in found]
    return [_fit(group, window, prompt) for group in groups]


def _fit(
    group: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]],
    window: Window | None,
    text: str,
) -> Encoded:
    """Cut the prompt of choices that share it; the last token of a choice is never read."""
    before, prompt, _ = group[0]
    choices = tuple(choice for _, _, choice in group)
    return Encoded(cut_left(before, prompt, max(map(len, choices)) - 1, window, text), choices)


def _choose_first(tokenizer: Any) -> tuple[int, ...]:
    """Choose the token before a text that nothing precedes."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (token,)
    raise UsageError(
        "a prompt is empty, and the tokenizer has neither BOS nor EOS to begin with",
        "use a task whose template has some text before the choices",
    )
