"""Answer commands from stdin, one per line, each with one line of JSON. Needs only the standard library."""

from __future__ import annotations

import json
import sys
from typing import Any


def answer(side: Any) -> None:
    """Answer commands until stdin ends. Only answers go to stdout.

    Args:
        side: The object that answers: the command `word a b` calls `side.do_word("a", "b")`.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        word, *rest = line.split()
        print(json.dumps(getattr(side, f"do_{word}")(*rest)), file=answers, flush=True)
