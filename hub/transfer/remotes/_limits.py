"""The limits that a user sets on downloads, and the type of progress callbacks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from experthub.hub.errors import HubError, IntegrityError, UsageError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}

_max_size: ContextVar[int | None] = ContextVar("max_size", default=None)

# Called with the number of bytes done and the total number of bytes (0 if it is unknown).
Progress = Callable[[int, int], None]


def ignore_progress(done: int, size: int) -> None:
    """Ignore a progress report.

    Args:
        done: The number of bytes done.
        size: The total number of bytes; 0 if it is unknown.
    """


def is_offline() -> bool:
    """Tell whether `HUB_OFFLINE` forbids opening sockets.

    Returns:
        Whether the variable is set to anything but `0`.
    """
    return os.environ.get("HUB_OFFLINE", "") not in ("", "0")


def check_online(what: str) -> None:
    """Check that the user allows downloads.

    Args:
        what: The thing to be downloaded, for the error.

    Raises:
        HubError: `HUB_OFFLINE` is set.
    """
    if is_offline():
        raise HubError(
            f"HUB_OFFLINE is set, and {what} is not stored here", "unset HUB_OFFLINE to fetch it"
        )


def parse_size(text: str) -> int:
    """Parse a size such as `500MB`, `2GB`, `1.5GiB` or a plain number.

    Args:
        text: The size.

    Returns:
        The number of bytes.

    Raises:
        UsageError: The text is not a size.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]?I?)B?", text.strip().upper())
    if not found or found.group(2) not in UNITS:
        raise UsageError(f"{text!r} is not a size", "write 500MB, 2GB, 1.5GiB or a number of bytes")
    return int(float(found.group(1)) * UNITS[found.group(2)])


@contextmanager
def limit_download_size(size: int | None) -> Iterator[None]:
    """Refuse larger downloads during the block.

    Args:
        size: The largest allowed number of bytes. None means no limit.

    Yields:
        Nothing.
    """
    before = _max_size.set(size)
    try:
        yield
    finally:
        _max_size.reset(before)


def check_size(what: str, size: int) -> None:
    """Check that the user allows a download of some size.

    Args:
        what: The thing to be downloaded, for the error.
        size: The number of bytes.

    Raises:
        IntegrityError: The size is above the limit.
    """
    most = _max_size.get()
    if most is not None and size > most:
        raise IntegrityError(
            f"{what} has {size} bytes, but at most {most} bytes are allowed",
            "allow more bytes with --max-size",
        )
