"""Hints for words that are not known, such as a misspelt key or name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_LISTED = 20  # words


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
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    if not known or len(known) > MAX_LISTED:
        return ""
    if len(known) == 1:
        return f"use {known[0]}"
    return f"use one of {', '.join(known)}"
