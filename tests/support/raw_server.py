"""A server that sends exactly the bytes that a test gives it, and counts them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator

Respond = Callable[[str], Iterable[bytes]]


class RawServer:
    """A server on a free port. `respond` maps the path of a request to the pieces of its answer."""

    def __init__(self, respond: Respond) -> None:
        self.respond, self.sent, self.paths = respond, 0, list[str]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += connection.recv(65536)
            path = asked.split(b" ")[1].decode()
            self.paths.append(path)
            for piece in self.respond(path):
                connection.sendall(piece)
                self.sent += len(piece)

    def close(self) -> None:
        self.listener.close()


def answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; underscores in the names of headers stand for hyphens."""
    stated = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
    stated |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in stated.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def drip(start: bytes, piece: bytes, seconds: float = 20) -> Iterator[bytes]:
    """Some bytes at once, and then a piece every twentieth of a second for some time."""
    yield start
    for _ in range(int(seconds * 20)):
        time.sleep(0.05)
        yield piece
