"""Progress of long operations, as callbacks."""

from __future__ import annotations

from collections.abc import Callable

# A progress callback is called with a description, the amount done, and the total amount, which is 0
# if it is unknown. A description that starts with "note: " is a message that stays on the screen.
Report = Callable[[str, int, int], None]


def silent(what: str, done: int, size: int) -> None:
    """Ignore a progress report.

    Args:
        what: A description of the operation.
        done: The amount done.
        size: The total amount; 0 if it is unknown.
    """
