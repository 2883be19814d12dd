"""Tokens of a trace, with the text that each of them adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are a part of a character


@dataclass(frozen=True)
class Token:
    """One token.

    text: what it adds to the text, nothing where it begins a character that a later one ends.
    position: in its own text.  prompt: which one, from 0.  written: by the model, after the prompt.
    """

    id: int
    text: str
    position: int
    prompt: int
    written: bool

    def record(self) -> dict[str, Any]:
        return asdict(self)


def pieces(tokenizer: Any, ids: Sequence[int], new: Sequence[int], prompt: int) -> list[Token]:
    """The tokens of a prompt and of what was written after it."""
    both = [*ids, *new]
    return [
        Token(id, text, position, prompt, position >= len(ids))
        for position, (id, text) in enumerate(zip(both, _texts(tokenizer, both), strict=True))
    ]


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds: put together, they are the text.

    Each is decoded after the one before it, which decides on spaces.
    """

    def decoded(start: int, end: int) -> str:
        text: str = tokenizer.decode(
            ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = decoded(start, end)
        if text.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(decoded(start, done)) :])
        start, done = done, end
    return texts
