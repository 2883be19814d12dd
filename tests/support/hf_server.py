"""A Hugging Face Hub on this machine, for the real clients and for ours, with faults on demand.

It has models only, and neither pull requests nor Xet.  Whoever runs it decides what goes wrong:

    with HfServer(folder) as hub:
        fault = hub.fault(r"/resolve/.*safetensors", cut=1000, times=1)
        ...
        assert fault.hits == 1 and hub.seen(r"/resolve/")[-1].headers["range"] == "bytes=1000-"
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import hf_routes  # noqa: F401  (it fills ROUTES)
from hf_store import Refused, Store
from hf_wire import ROUTES, Answer, Body, Call, Fault, Faults, Request, User, faulty, refusal, send

USERS = {"hf_write": User("alice"), "hf_read": User("alice", "read"), "hf_other": User("bob")}


class HfServer:
    """The Hub below a folder, on a port that it keeps; all but its users and settings is on disk.

    page: entries on one page of a list.  multipart: LFS files of more bytes come in parts of so
    many.  verify: uploads are to be confirmed.  Every request that came is in `requests`.
    """

    def __init__(self, root: Path, users: dict[str, User] | None = None, port: int = 0) -> None:
        self.store = Store(root)
        self.users = dict(USERS if users is None else users)
        self.port = port
        self.page, self.multipart, self.verify = 1000, 0, False
        self.requests: list[Request] = []
        self.faults = Faults()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self.http = Http(self)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop at once, in the middle of everything."""
        self.http.shutdown()
        self.http.server_close()
        self.http.cut()

    def __enter__(self) -> HfServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def fault(self, path: str, **how: Any) -> Fault:
        """Put a fault in force; see Fault."""
        made = Fault(path, **how)
        self.faults.all.append(made)
        return made

    def seen(self, path: str = "", method: str = ".*") -> list[Request]:
        """The requests with such a path and method, oldest first."""
        matching = [r for r in self.requests if re.search(path, r.path)]
        return [r for r in matching if re.fullmatch(method, r.method)]

    def answer(self, request: Request, body: Body) -> Answer:
        """Answer a request if no fault applies."""
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, function in ROUTES:
            match = pattern.fullmatch(request.path)
            if wanted != method or not match:
                continue
            names = {name: unquote(value or "") for name, value in match.groupdict().items()}
            try:
                return function(Call(self, request, body, names, self.user(request)))
            except Refused as no:
                return refusal(no.status, no.message, no.code)
            except (KeyError, TypeError, ValueError) as error:
                return refusal(400, f"Bad request: {error!r}")
        return refusal(404, "Sorry, we can't find the page you are looking for.")

    def user(self, request: Request) -> User | None:
        """Return the owner of the token; a wrong one is refused even where none is needed."""
        login = request.headers.get("authorization")
        if login is None:
            return None
        if login.removeprefix("Bearer ") not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.users[login.removeprefix("Bearer ")]


class Http(ThreadingHTTPServer):
    """The sockets of a Hub, which can be cut."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HfServer) -> None:
        self.hub = hub
        self.live: set[Any] = set()
        super().__init__(("127.0.0.1", hub.port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.live.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.live.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong here; a client that has heard enough is none of it."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        """Close every connection."""
        for request in list(self.live):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        """Read a request, remember it, and answer it, unless a fault keeps that from it."""
        hub = cast(Http, self.server).hub
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, address.path, query, headers)
        hub.requests.append(request)
        fault = hub.faults.meet(request)
        body = Body(self.rfile, request, fault.take)
        try:
            if fault.wait:
                fault.wait.wait(60)
            if fault.status:
                answer = refusal(fault.status, "Something went wrong on purpose")
            else:
                answer = faulty(hub.answer(request, body), fault)
            for _ in body.pieces():
                pass
            if fault.lose:
                raise ConnectionAbortedError("the answer is lost")
            answer.headers["X-Request-Id"] = f"Root=1-{secrets.token_hex(16)}"
            send(self, request, answer, fault)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass
