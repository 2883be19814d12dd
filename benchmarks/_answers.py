"""The loop of a process that answers commands, one a line, each with one line of JSON; standard library only."""

from __future__ import annotations

import json
import sys
from typing import Any


def answer(side: Any) -> None:
    """`word a b` calls `side.do_word("a", "b")`, until stdin ends; only answers go to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        word, *rest = line.split()
        print(json.dumps(getattr(side, f"do_{word}")(*rest)), file=answers, flush=True)
