"""Arguments that several commands read alike."""

from __future__ import annotations

import re
from pathlib import Path


def task_references(given: list[str]) -> list[str]:
    """Tasks as words of a command: names, several with commas between, or @FILE with one a line."""
    named: list[str] = []
    for text in given:
        if text.startswith("@"):
            path = Path(text[1:])
            if not path.is_file():
                from experthub.hub.errors import NotFoundError

                raise NotFoundError(
                    f"there is no file {path}", "one task per line is expected in it"
                )
            named += [line.strip() for line in path.read_text().splitlines() if line.strip()]
        else:
            named += [part for part in re.split(r"[,\s]+", text) if part]
    return named
