"""Hints for words that are not known, such as a misspelt key or name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest_name(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Write a hint for an unknown word: the most similar known word, or all known words.

    Args:
        word: The unknown word.
        known: The known words.
        prefix: A text to put before the suggested word.

    Returns:
        The hint; an empty text if there are no known words.

    Example:
        >>> suggest_name("liner", ["linear", "ties"])
        "did you mean 'linear'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    if len(known) < 2:
        return f"use {known[0]}" if known else ""
    return f"use one of {', '.join(known)}"
