"""Requests and answers of the test Hub on the wire, and all that can go wrong with them there."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from hf_store import PIECE, Refused, Repository

if TYPE_CHECKING:
    from hf_server import HfServer


@dataclass
class Request:
    """A request with header names in lower case, and the status and the bytes of its answer.

    `received` and `sent` count the bytes of the two bodies."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    received: int = 0
    status: int | None = None
    sent: int = 0


@dataclass
class Answer:
    """An answer; `ranged` ones come in parts, and `elsewhere` is their path without a login."""

    body: bytes | Path = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ranged: bool = False
    elsewhere: str = ""


@dataclass
class Fault:
    """A fault of requests whose path matches; by default of every GET, for ever.

    path: searched in the path as it was sent, without the query.  method: matched whole.
    times: to so many requests only.  skip: after letting so many pass.  hits: so often until now.

    status: this error instead of an answer.    headers: set these (None removes one).
    redirect: a file is to be had from the Hub at this address, without a login.
    cut: close after so many bytes of the body, with the Content-Length of the whole.
    change: other bytes, with a Content-Length that fits them.    length: this Content-Length.
    json: another document in place of this one.    no_range: a whole body, with 200.
    pause: seconds between pieces of `piece` bytes.    wait: for this, for a minute at most.
    take: close after so many bytes of the request.    lose: do it all, and never answer.
    """

    path: str
    method: str = "GET"
    times: int | None = None
    skip: int = 0
    hits: int = 0
    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    redirect: str = ""
    cut: int | None = None
    change: Callable[[bytes], bytes] | None = None
    length: int | None = None
    json: Callable[[Any], Any] | None = None
    no_range: bool = False
    pause: float = 0
    piece: int = 1 << 30
    wait: threading.Event | None = None
    take: int | None = None
    lose: bool = False


class Faults:
    """The faults in force; the first that matches a request is the one it meets."""

    def __init__(self) -> None:
        self.all: list[Fault] = []
        self.lock = threading.Lock()

    def meet(self, request: Request) -> Fault:
        """The fault for a request, which may be none at all."""
        with self.lock:
            for fault in self.all:
                matches = re.fullmatch(fault.method, request.method)
                if not matches or not re.search(fault.path, request.path) or fault.times == 0:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.hits += 1
                fault.times = None if fault.times is None else fault.times - 1
                return fault
        return Fault("")


class Body:
    """The body of a request, whole or in chunks; it breaks off where the line does."""

    def __init__(self, file: io.BufferedIOBase, request: Request, take: int | None) -> None:
        self.file, self.request, self.take = file, request, take
        self.chunked = request.headers.get("transfer-encoding", "").lower() == "chunked"
        self.left = 0 if self.chunked else int(request.headers.get("content-length", 0))

    def pieces(self) -> Iterator[bytes]:
        """Yield the part of the body that is left."""
        while self.left or self.chunked:
            if not self.left:
                self.left = int(self._line().split(b";")[0], 16)
                if not self.left:
                    self.chunked = bool(self._line().strip())  # no trailers
                    continue
            wanted = min(self.left, PIECE)
            if self.take is not None:
                wanted = min(wanted, self.take - self.request.received)
            piece = self.file.read(wanted)
            self.request.received += len(piece)
            if not piece or len(piece) < wanted:
                raise ConnectionAbortedError("the body broke off")
            self.left -= len(piece)
            if self.chunked and not self.left:
                self._line()
            yield piece

    def _line(self) -> bytes:
        line = self.file.readline(1000)
        if not line.endswith(b"\n"):
            raise ConnectionAbortedError("the body broke off")
        return line

    def bytes(self) -> bytes:
        return b"".join(self.pieces())

    def json(self) -> Any:
        return json.loads(self.bytes())


def document(value: Any, status: int = 200, **headers: str) -> Answer:
    """A JSON answer."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(json.dumps(value).encode(), status, kind | headers)


def refusal(status: int, message: str, code: str | None = None) -> Answer:
    """An error as the Hub sends it."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'
    return document({"error": message}, status, **headers)


def faulty(answer: Answer, fault: Fault) -> Answer:
    """The answer, as the fault leaves it."""
    if fault.redirect and answer.elsewhere and answer.status == 200:
        assert isinstance(answer.body, Path)
        linked = {"X-Linked-Etag": answer.headers["ETag"]}
        linked["X-Linked-Size"] = str(answer.body.stat().st_size)
        onward = {"Location": fault.redirect + answer.elsewhere}
        answer = Answer(b"", 302, answer.headers | linked | onward)
    if answer.status == 200 and (fault.change or fault.json):
        body = answer.body.read_bytes() if isinstance(answer.body, Path) else answer.body
        body = fault.change(body) if fault.change else body
        answer.body = json.dumps(fault.json(json.loads(body))).encode() if fault.json else body
    return answer


def part_of(answer: Answer, size: int, asked: dict[str, str]) -> range | None:
    """The bytes that a Range header asks for; None for all of them, as when it makes no sense."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.get("range", ""))
    same = asked.get("if-range", answer.headers.get("ETag")) == answer.headers.get("ETag")
    if not match or not same or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return range(max(size - int(last), 0), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)


def send(handler: BaseHTTPRequestHandler, request: Request, answer: Answer, fault: Fault) -> None:
    """Send an answer, or as much of it as the fault lets through."""
    headers: dict[str, str | None] = {**answer.headers}
    status, body = answer.status, answer.body
    with body.open("rb") if isinstance(body, Path) else io.BytesIO(body) as file:
        size = file.seek(0, io.SEEK_END)
        sent = range(size)
        if answer.ranged and status == 200:
            headers["Accept-Ranges"] = "bytes"
            part = None if fault.no_range else part_of(answer, size, request.headers)
            if part is not None:
                status, sent = (206, part) if part else (416, range(0))
                spot = f"{part.start}-{part.stop - 1}" if part else "*"
                headers["Content-Range"] = f"bytes {spot}/{size}"
        headers["Content-Length"] = str(len(sent) if fault.length is None else fault.length)
        request.status = status
        handler.send_response(status)
        for name, value in (headers | fault.headers).items():
            if value is not None:
                handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        left = len(sent) if fault.cut is None else min(fault.cut, len(sent))
        for at in range(sent.start, sent.start + left, fault.piece):
            file.seek(at)
            piece = min(fault.piece, sent.start + left - at)
            try:
                handler.connection.sendfile(file, at, piece)  # the system's own, for files
            finally:
                request.sent += file.tell() - at
            if fault.pause:
                time.sleep(fault.pause)
        if fault.length is not None or (fault.cut is not None and fault.cut < len(sent)):
            handler.close_connection = True


@dataclass(frozen=True)
class User:
    """The owner of a token; a read token cannot write."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, owner: str) -> bool:
        return owner in (self.name, *self.orgs)


@dataclass
class Call:
    """A request on its way to an answer: the names in its path, and who asks."""

    hub: HfServer
    request: Request
    body: Body
    names: dict[str, str]
    user: User | None

    def repository(self, write: bool = False) -> Repository:
        """The repository that is meant, for who may see it, or write to it."""
        found = self.hub.store.repository(self.names["repo"])
        owner = found.id.split("/")[0]
        own = self.user is not None and self.user.owns(owner)
        if not found.exists or (found.state["private"] and not own):
            if self.user is None:  # the Hub does not tell what there is
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self.allow(owner)
        return found

    def allow(self, owner: str) -> None:
        """Refuse to write for somebody else, or with a read token."""
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.user.role != "write" or not self.user.owns(owner):
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{owner}"')

    def paged(self, entries: list[dict[str, Any]]) -> Answer:
        """A page of a list, with a link to the next."""
        query = self.request.query
        start = int(query.get("cursor", 0))
        end = start + min(self.hub.page, int(query.get("limit", self.hub.page)))
        answer = document(entries[start:end])
        if end < len(entries):
            onward = f"{self.hub.url}{self.request.path}?{urlencode(query | {'cursor': str(end)})}"
            answer.headers["Link"] = f'<{onward}>; rel="next"'
        return answer


Route = Callable[[Call], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, path: str) -> Callable[[Route], Route]:
    """Let a function answer what comes to a path."""

    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(path), function))
        return function

    return add
