"""Servers that send too much, too slowly, compressed, or of another size than they should."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import run_hub
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.transfer.remotes import _deadlines, _hf_files, _http, hf, pypi
from experthub.hub.transfer.remotes._download import download
from raw_server import RawServer, Respond, answer, drip

pytestmark = pytest.mark.attack
MIB = 1 << 20
BOMB = gzip.compress(gzip.compress(bytes(300 * MIB)))
COMMIT = "0123456789" * 4
Start = Callable[[Respond], RawServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a server that is the model hub and the package index."""
    servers = []
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def start(respond: Respond) -> RawServer:
        servers.append(RawServer(respond))
        monkeypatch.setenv("HF_ENDPOINT", servers[-1].url)
        monkeypatch.setattr(pypi, "find_index_url", lambda: f"{servers[-1].url}/simple")
        return servers[-1]

    monkeypatch.setattr(_http, "WAIT", 0.001)
    yield start
    for server in servers:
        server.close()


COMPRESSED = {
    "answer": lambda path: [answer(BOMB, Content_Encoding="gzip, gzip")],
    "error": lambda path: [answer(BOMB, "404 Not Found", Content_Encoding="gzip, gzip")],
    "redirection": lambda path: [
        answer(BOMB, "302 Found", Content_Encoding="gzip, gzip", Location="/on")
        if path != "/on"
        else answer(b"no")
    ],
}


@pytest.mark.parametrize("what", COMPRESSED)
@pytest.mark.parametrize("where", ["hub", "index"])
def test_compressed_answers_are_not_unpacked(
    what: str, where: str, serve: Start, tmp_path: Path
) -> None:
    serve(COMPRESSED[what])
    tracemalloc.start()
    try:
        if where == "hub":
            ran = run_hub("pull", "hf:evil/x")
            assert ran.code and ran.err.count("error: ") == 1 and "Traceback" not in ran.err
            assert what != "answer" or "compressed" in ran.err
        else:
            with pytest.raises(HubError):
                pypi.fetch("tiny", "1.0", ".whl", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


def endless(path: str) -> Iterator[bytes]:
    """A list that does not end; it stops at 100 MiB."""
    yield b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
    for _ in range(100):
        yield b" " * MIB


@pytest.mark.parametrize("where", ["hub", "index"])
def test_endless_answers_are_cut(where: str, serve: Start, tmp_path: Path) -> None:
    server = serve(endless)
    if where == "hub":
        assert run_hub("pull", "hf:evil/x").code == 3
    else:
        with pytest.raises(IntegrityError, match="longer than"):
            pypi.fetch("tiny", "1.0", ".whl", tmp_path)
    assert server.sent < 40 * MIB


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DRIPS: dict[str, tuple[bytes, bytes]] = {
    "headers": (OK + b"X: ", b"a"),
    "body": (OK + b"Content-Length: 100000\r\n\r\n", b" "),
    "chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "extension": (OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a"),
    "until closed": (OK + b"\r\n", b" "),
}


@pytest.mark.parametrize("what", DRIPS)
@pytest.mark.parametrize("where", ["hub", "index", "download"])
def test_dripping_servers_are_cut(
    what: str,
    where: str,
    serve: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_deadlines, "ANSWER_SECONDS", 0.5)
    server = serve(lambda path: drip(*DRIPS[what]))
    with pytest.raises(HubError, match="too slowly"):
        if where == "hub":
            hf.fetch("hf:evil/x", tmp_path)
        elif where == "index":
            pypi.fetch("tiny", "1.0", ".whl", tmp_path)
        else:
            download(f"{server.url}/file", "0" * 64, tmp_path / "partial")
    assert len(server.paths) == 1


def test_a_download_is_cut_that_breaks_after_each_byte(serve: Start, tmp_path: Path) -> None:
    """A try that brings little counts as failed; it would otherwise take for ever."""
    content = bytes(1000)

    def respond(path: str) -> list[bytes]:
        at = len(server.paths) - 1
        stated = f"bytes {at}-999/1000"
        return [answer(content[at:], "206 Partial Content", Content_Range=stated)[: at - 999]]

    server = serve(respond)
    with pytest.raises(HubError, match="no answer"):
        download(f"{server.url}/file", hashlib.sha256(content).hexdigest(), tmp_path)
    assert len(server.paths) == _http.TRIES


def test_a_slow_list_of_many_pages_is_given_up(
    serve: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hf_files, "LIST_SECONDS", 0.0)

    def respond(path: str) -> list[bytes]:
        if "/revision/" in path:
            return [answer(json.dumps({"sha": COMMIT}).encode())]
        return [answer(b"[]", Link=f'<{path}>; rel="next"')]

    server = serve(respond)
    with pytest.raises(HubError, match="took more than"):
        hf.fetch("hf:evil/x", tmp_path)
    assert len(server.paths) == 2


@pytest.mark.parametrize(
    "page",
    [
        b"<a " * (4 * MIB // 3),
        b'<a href="' + b"x" * 4 * MIB,
        b"<a " + b'href="x#sha256=0" ' * (4 * MIB // 18),
        b'<a href="x#sha256=0">' * (4 * MIB // 21),
    ],
    ids=["tags", "link", "links", "names"],
)
def test_index_pages_are_read_in_linear_time(page: bytes, serve: Start, tmp_path: Path) -> None:
    serve(lambda path: [answer(page, Content_Type="text/html")])
    with pytest.raises(HubError, match="has no"):
        pypi.fetch("tiny", "1.0", ".whl", tmp_path)


CONTENT = bytes(3 * MIB)
SIZES: dict[str, Respond] = {
    "Content-Length": lambda path: [answer(CONTENT)],
    "Content-Range": lambda path: [
        answer(CONTENT, "206 Partial Content", Content_Range=f"bytes 0-{3 * MIB - 1}/{3 * MIB}")
    ],
}


@pytest.mark.parametrize("what", SIZES)
@pytest.mark.parametrize("size", [MIB, 4 * MIB])
@pytest.mark.parametrize("started", [False, True])
def test_a_file_of_another_size_is_refused_before_its_bytes(
    what: str, size: int, started: bool, serve: Start, tmp_path: Path
) -> None:
    seen = 0

    def count(done: int, _: int) -> None:
        nonlocal seen
        seen = done

    if started:
        (tmp_path / ("0" * 64)).write_bytes(bytes(10))
    server = serve(SIZES[what])
    with pytest.raises(IntegrityError, match=f"has {3 * MIB} bytes, expected {size}"):
        download(f"{server.url}/x", "0" * 64, tmp_path, count, size=size)
    assert seen == 0


def test_a_list_with_two_sizes_of_one_file_is_refused(serve: Start, tmp_path: Path) -> None:
    large = {"oid": "0" * 64, "size": 10}
    row = {"type": "file", "path": "a.safetensors", "oid": COMMIT, "size": 1 << 40, "lfs": large}

    def respond(path: str) -> list[bytes]:
        found = {"sha": COMMIT} if "/revision/" in path else [row]
        return [answer(json.dumps(found).encode())]

    server = serve(respond)
    with pytest.raises(IntegrityError, match="no valid size"):
        hf.fetch("hf:evil/x", tmp_path)
    assert len(server.paths) == 2
