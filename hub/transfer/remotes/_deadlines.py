"""Deadlines of requests: the connection of an answer that comes too slowly is cut."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from experthub.hub.errors import HubError

ANSWER_SECONDS = 120.0  # The time for an answer, and for each LEAST_PROGRESS bytes of a download.
LEAST_PROGRESS = 64 << 10


class Stopwatch:
    """A clock that cuts the connection of one request when the time is over.

    httpx limits the time of each single read, and a server that sends a byte a second never
    exceeds it. An instance is a context manager around the request, and the `trace` extension of
    the request, which tells it about new connections.

    Args:
        what: The URL of the request, for the error.
    """

    def __init__(self, what: str) -> None:
        self.what, self.expired, self._done = what, False, False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.extend()

    def extend(self) -> None:
        """Start the time again, because the answer has made progress."""
        self._end = time.monotonic() + ANSWER_SECONDS

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        """Remember a new connection.

        Args:
            event: The name of an event of httpcore.
            info: Its values. `return_value` of an opened connection is its stream.
        """
        if event.endswith("connect_tcp.complete"):
            # TLS detaches the first object from the connection, but not its duplicate.
            copied = info["return_value"].get_extra_info("socket").dup()
            with self._lock:
                self._sockets.append(copied)
                if self.expired:
                    self._cut()

    def _cut(self) -> None:
        """End all reads from the connections."""
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _start(self) -> None:
        """Wait for the end of the time in another thread."""
        left = max(0.0, self._end - time.monotonic())
        self._timer = threading.Timer(left, self._check)
        self._timer.daemon = True
        self._timer.start()

    def _check(self) -> None:
        """Cut the connections, unless the time was extended."""
        with self._lock:
            if self._done:
                return
            if time.monotonic() < self._end:
                self._start()
                return
            self.expired = True
            self._cut()

    def __enter__(self) -> Stopwatch:
        """Start the clock."""
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the clock, and raise HubError if the time was over."""
        with self._lock:
            self._done = True
            self._timer.cancel()
            for connection in self._sockets:
                connection.close()
        if self.expired and (error is None or isinstance(error, Exception)):
            raise HubError(
                f"{self.what} answers too slowly: fewer than {LEAST_PROGRESS} bytes in {ANSWER_SECONDS:g} s",
                "try again later, or use another source; a download continues where it stopped",
            ) from None
