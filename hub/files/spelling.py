"""Hints for words that are not known, such as a misspelt key or name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from experthub.hub.errors import UsageError

MAX_LISTED = 20  # words


def find_similar(word: str, known: Iterable[str]) -> str | None:
    """Find the known word that is the most similar to an unknown one.

    Args:
        word: The unknown word.
        known: The known words.

    Returns:
        The word; None if no known word is similar.
    """
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)), None)


def check_choice(word: str, known: Iterable[str], what: str) -> None:
    """Refuse a word that is not one of the known ones.

    Args:
        word: The word.
        known: The known words.
        what: The name of what the word chooses, for the error.

    Raises:
        UsageError: The word is unknown.
    """
    known = list(known)
    if word not in known:
        raise UsageError(f"unknown {what} {word!r}", suggest_name(word, known))


def suggest_name(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Write a hint for an unknown word: the most similar known word, or a list of all known words.

    Args:
        word: The unknown word.
        known: The known words.
        prefix: A text to put before the suggested word.

    Returns:
        The hint. It is an empty text if no word is known, or if more than `MAX_LISTED` words are
        known and none is similar.

    Example:
        >>> suggest_name("liner", ["linear", "ties"])
        "did you mean 'linear'?"
    """
    known = sorted(known)
    close = find_similar(word, known)
    if close is not None:
        return f"did you mean {prefix + close!r}?"
    if not known or len(known) > MAX_LISTED:
        return ""
    if len(known) == 1:
        return f"use {known[0]}"
    return f"use one of {', '.join(known)}"
