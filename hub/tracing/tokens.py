"""Tokens of a trace, each with the text that it adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the decoded text of an incomplete character


@dataclass(frozen=True)
class Token:
    """A token of a trace.

    Args:
        id: The id of the token.
        text: The text that the token adds; empty if a later token completes its character.
        position: The position among the tokens of its prompt, from 0.
        prompt: The number of its prompt, from 0.
        written: Whether the model generated the token after the prompt.
    """

    id: int
    text: str
    position: int
    prompt: int
    written: bool

    def record(self) -> dict[str, Any]:
        """Return the token as plain values.

        Returns:
            The fields by name.
        """
        return asdict(self)


def build_tokens(
    tokenizer: Any, ids: Sequence[int], new: Sequence[int], prompt: int
) -> list[Token]:
    """Build the tokens of a prompt and of its continuation.

    Args:
        tokenizer: The tokenizer.
        ids: The token ids of the prompt.
        new: The token ids that the model generated after it.
        prompt: The number of the prompt, from 0.

    Returns:
        The tokens.
    """
    both = [*ids, *new]
    return [
        Token(id, text, position, prompt, position >= len(ids))
        for position, (id, text) in enumerate(zip(both, _split_text(tokenizer, both), strict=True))
    ]


def _split_text(tokenizer: Any, ids: list[int]) -> list[str]:
    """Split the decoded text into the parts that the tokens add.

    Every token is decoded together with the token before it, because that token determines whether
    a space is added.
    """

    def decode(start: int, end: int) -> str:
        text: str = tokenizer.decode(
            ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = decode(start, end)
        if text.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(decode(start, done)) :])
        start, done = done, end
    return texts
