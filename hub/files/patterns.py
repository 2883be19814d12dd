"""Patterns that users write: checked before they are used, and never matched forever."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from reprlib import repr as short

LONGEST = 10_000  # characters
SECONDS = 5.0  # Processor time; matching thousands of modules takes a hundredth of a second.


def check_pattern(text: str) -> str:
    """Check that Python can compile a regular expression, alone and as a group.

    Args:
        text: The regular expression.

    Returns:
        The same text.

    Raises:
        ValueError: The text is too long or is not a regular expression.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a regular expression of {len(text)} characters is too long")
    try:
        with limit_matching_time():  # Large classes of characters take minutes to compile.
            re.compile(f"({text})")
            re.compile(text)
    except (re.error, RecursionError, OverflowError, TimeoutError) as error:
        if isinstance(error, TimeoutError) and _is_limited():
            raise  # The time of the outer block is over, too.
        raise ValueError(f"{short(text)} is not a regular expression: {error}") from None
    return text


@contextmanager
def limit_matching_time() -> Iterator[None]:
    """Limit the processor time of a block, because some patterns make `re` run forever.

    Only a signal can interrupt a match, and only the main thread receives signals. In other
    threads the time is not limited. A block inside another one shares its time.

    Yields:
        Nothing.

    Raises:
        TimeoutError: The block used too much processor time.
    """
    if _is_limited() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError("matching takes too long")

    stop.limits_matching = True  # type: ignore[attr-defined]
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _is_limited() -> bool:
    """Tell whether the code runs inside a block of `limit_matching_time`."""
    return hasattr(signal.getsignal(signal.SIGVTALRM), "limits_matching")


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a file name matches one of several shell patterns.

    Args:
        name: The file name.
        patterns: The patterns.

    Returns:
        Whether one of them matches; case counts.
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)
