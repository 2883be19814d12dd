"""Regular expressions of others: compiled or refused, and never matched for ever."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import repr as short

LONGEST = 10_000  # characters
SECONDS = 5.0  # of the processor; thousands of modules take a hundredth of one


def checked_pattern(text: str) -> str:
    """The pattern; ValueError when Python cannot compile it, alone or as a group."""
    if len(text) > LONGEST:
        raise ValueError(f"a regular expression of {len(text)} characters")
    try:
        re.compile(f"({text})")
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{short(text)} is no regular expression: {error}") from None
    return text


@contextmanager
def matching() -> Iterator[None]:
    """TimeoutError when the block computes for too long, as some patterns make `re` do.

    A signal of the processor's time can end a match; only the main thread can have one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError("matching takes too long")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
