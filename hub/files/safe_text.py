"""Texts of others as they are shown: without characters that a terminal, a plot or a line obeys."""

from __future__ import annotations

import json
import re

# What a shell, a file system and a line of text leave as it is.
WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


def escape(text: str) -> str:
    """Escape characters that are not printable, such as those that move a cursor or hide text.

    This includes ESC and other controls, C1, line breaks, bidirectional overrides and surrogates.

    Args:
        text: A text that may come from somebody else.

    Returns:
        The text as it can be shown on one line. A text that is escaped already stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape_block(text: str) -> str:
    """Escape a text of several lines; line breaks and tabs stay.

    Args:
        text: A text that may come from somebody else.

    Returns:
        The text as it can be shown on a terminal.
    """
    return re.sub(r"[^\n\t]+", lambda found: escape(found.group()), text)


def escape_json(text: str) -> str:
    r"""Escape characters in JSON that are not printable, as `\uXXXX`; its value stays the same.

    Args:
        text: JSON.

    Returns:
        The same JSON.
    """
    lines = (
        line
        if line.isprintable()
        else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        for line in text.split("\n")
    )
    return "\n".join(lines)


def is_reference(text: str) -> bool:
    """Tell whether a text is made of words that no shell evaluates, as `suite:name@1` is.

    Args:
        text: The text.

    Returns:
        Whether it consists of words, joined by `:`, `/` or `@`.
    """
    return re.fullmatch(rf"{WORD}([:/@]{WORD})*", text) is not None
