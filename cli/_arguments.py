"""Arguments that several commands parse in the same way."""

from __future__ import annotations

import re
from pathlib import Path


def split_names(*given: list[str] | None) -> list[str]:
    """Split arguments that hold several names.

    Args:
        *given: The values of an argument or an option; names are separated by commas or spaces.

    Returns:
        The names in their order.
    """
    texts = [text for some in given for text in some or ()]
    return [name for text in texts for name in re.split(r"[,\s]+", text) if name]


def read_task_references(given: list[str]) -> list[str]:
    """Read the tasks that a command names.

    Args:
        given: The values of an option. Each holds references that are separated by commas or
            spaces, or is `@FILE` with the path of a file with one reference per line.

    Returns:
        The references in their order.

    Raises:
        NotFoundError: A file does not exist.
        UsageError: A file is not a text file in UTF-8.
    """
    named: list[str] = []
    for text in given:
        if text.startswith("@"):
            path = Path(text[1:])
            if not path.is_file():
                from experthub.hub.errors import NotFoundError

                raise NotFoundError(
                    f"{path} does not exist", "name a text file with one task per line"
                )
            named += [line.strip() for line in _read_text(path).splitlines() if line.strip()]
        else:
            named += split_names([text])
    return named


def _read_text(path: Path) -> str:
    """Read a text file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        from experthub.hub.errors import UsageError

        raise UsageError(
            f"{path} is not a text file in UTF-8", "name a text file with one task per line"
        ) from None
