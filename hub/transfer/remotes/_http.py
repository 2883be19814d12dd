"""Downloads over HTTP: ranged, resumable, checked."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.hub.errors import AuthError, HubError, IntegrityError, NotFoundError, UsageError

if TYPE_CHECKING:
    import httpx

TRIES, WAIT = 5, 0.5  # tries without a byte, and seconds before the second; each wait is doubled
BUSY = (429, 500, 502, 503, 504)
SHA256 = re.compile(r"[0-9a-f]{64}")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}

_most: ContextVar[int | None] = ContextVar("most", default=None)

# Called with bytes done and bytes in all (0 when unknown).
Progress = Callable[[int, int], None]


def quiet(done: int, size: int) -> None:
    """Progress that nobody watches."""


def is_offline() -> bool:
    """Whether the user asked not to open a socket."""
    return os.environ.get("HUB_OFFLINE", "") not in ("", "0")


def check_online(what: str) -> None:
    """Raise HubError, before any socket is opened, when the user asked to stay offline."""
    if is_offline():
        raise HubError(
            f"HUB_OFFLINE is set, and {what} is not here", "unset HUB_OFFLINE to fetch it"
        )


def parse_size(text: str) -> int:
    """Bytes, of `500MB`, `2GB`, `1.5GiB` or a plain number; UsageError for anything else."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]?I?)B?", text.strip().upper())
    if not found or found.group(2) not in UNITS:
        raise UsageError(f"{text!r} is no size", "write bytes, 500MB, 2GB or 1.5GiB")
    return int(float(found.group(1)) * UNITS[found.group(2)])


@contextmanager
def at_most(size: int | None) -> Iterator[None]:
    """Refuse to fetch anything of more bytes inside the block; None for no limit but the disk's."""
    before = _most.set(size)
    try:
        yield
    finally:
        _most.reset(before)


def check_size(what: str, size: int) -> None:
    """Raise IntegrityError for more bytes than the user allows."""
    most = _most.get()
    if most is not None and size > most:
        raise IntegrityError(
            f"{what} has {size} bytes, and at most {most} are allowed", "allow more with --max-size"
        )


@cache
def _trust() -> ssl.SSLContext:
    """The system's certificates and certifi's; reading them takes a tenth of a second."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


@contextmanager
def client(headers: dict[str, str] | None = None) -> Iterator[httpx.Client]:
    """An HTTP client that trusts the system's certificates and certifi's; errors become HubError.

    headers: of every request; an Authorization among them does not follow to another host.
    """
    import httpx

    try:
        with httpx.Client(
            verify=_trust(), follow_redirects=True, timeout=60, headers=headers
        ) as session:
            yield session
    except httpx.HTTPStatusError as error:
        raise _status_error(error) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        url = getattr(getattr(error, "_request", None), "url", "") or "the server"
        raise HubError(
            f"no answer from {shown(url)}: {str(error) or type(error).__name__}",
            "check the network, or set HUB_OFFLINE=1 to use only what is here",
        ) from None


def shown(url: object) -> str:
    """A URL without the secrets that it may carry: a name, a password, a signature."""
    return re.sub(r"//[^/?#]*@", "//", str(url)).partition("?")[0]


def _status_error(error: httpx.HTTPStatusError) -> HubError:
    status, url = error.response.status_code, shown(error.request.url)
    if status in (401, 403):
        return AuthError(f"{url} answered {status}", "check your token and your access")
    if status in (404, 410):
        return NotFoundError(f"{url} does not exist", "check the name and the version")
    return HubError(f"{url} answered {status}", "try again later")


def download(
    url: str,
    sha256: str,
    folder: Path,
    progress: Progress = quiet,
    *,
    headers: dict[str, str] | None = None,
    size: int | None = None,
) -> Path:
    """Fetch a file to `folder/<sha256>`, going on from where an earlier try stopped.

    A line that breaks, and a server that is busy, are tried again a few times.  size: the bytes
    that it must have; no more are read.  Raises IntegrityError, and keeps nothing, when the bytes
    are not those of the digest.
    """
    check_online(shown(url))
    if not SHA256.fullmatch(sha256):  # it is to be a file's name
        raise IntegrityError(f"{shown(url)} has the digest {sha256[:80]!r}", "use another source")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / sha256
    with _locked(partial) as file:
        growing = Growing(file)
        try:
            with client(headers) as session:
                _patiently(
                    lambda: _fill(session, url, growing, progress, size), lambda: growing.size
                )
        except BaseException:
            if not file.tell():  # nothing to go on from
                partial.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
        found = growing.digest.hexdigest()
        if found != sha256:
            partial.unlink(missing_ok=True)
            raise IntegrityError(
                f"{shown(url)} has the sha256 {found[:12]}, expected {sha256[:12]}",
                "the file was changed on its way or at its source; try again",
            )
    return partial


@contextmanager
def _locked(path: Path) -> Iterator[BufferedRandom]:
    """A file to append to, alone; whoever had it before may have taken it away, whole."""
    while True:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if same:
                yield file
                return


class Growing:
    """A file, and the digest of every byte in it."""

    def __init__(self, file: BufferedRandom) -> None:
        self.file = file
        file.seek(0)
        self.digest = hashlib.file_digest(file, "sha256")

    @property
    def size(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    def write(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.digest.update(chunk)

    def empty(self) -> None:
        self.file.truncate(0)
        self.digest = hashlib.sha256()


def again(answer: httpx.Response, tries: int) -> bool:
    """Whether to ask again, after a wait: the server was busy, and not for too long.  tries: until now."""
    if answer.status_code not in (429, 503) or tries >= TRIES:
        return False
    time.sleep(max(WAIT * 2**tries, _retry_after(answer)))
    return True


def fetch_small(session: httpx.Client, url: str, size: int) -> bytes:
    """The bytes of a small file, of which the size is known; IntegrityError for another size.

    What breaks or is busy is tried again, from the beginning.
    """

    def fetched() -> bytes:
        content = bytearray()
        with session.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_raw():
                content += chunk
                if len(content) > size:
                    break
        return bytes(content)

    content: bytes = _patiently(fetched, lambda: 0)
    if len(content) != size:
        raise IntegrityError(
            f"{shown(url)} has {'more' if len(content) > size else 'fewer'} than {size} bytes",
            "it was cut or changed on its way; try again",
        )
    return content


def _patiently(call: Callable[[], Any], size: Callable[[], int]) -> Any:
    """What a call returns, called again after what passes.

    size: how much is there; a try that brought something does not count.
    """
    import httpx

    tries, reached = TRIES, False
    while True:
        before = size()
        wait = WAIT * 2 ** (TRIES - tries)
        try:
            return call()
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in BUSY:
                raise
            wait = max(wait, _retry_after(error.response))
            failure: httpx.HTTPError = error
        except httpx.TransportError as error:
            nobody = isinstance(error, httpx.ConnectError) and not reached
            if nobody or isinstance(error, httpx.UnsupportedProtocol):
                raise
            failure = error
        brought = size() > before
        reached = reached or brought
        tries = TRIES if brought else tries - 1
        if not tries:
            raise failure
        time.sleep(wait)


def _retry_after(answer: httpx.Response) -> float:
    """The seconds that a server asks for, a minute at most."""
    stated = answer.headers.get("Retry-After", "")
    return min(60.0, float(stated)) if re.fullmatch("[0-9]+", stated) else 0.0


def _fill(
    session: httpx.Client, url: str, growing: Growing, progress: Progress, limit: int | None
) -> None:
    start = growing.size
    if limit is not None and start == limit:
        return
    # As they are stored: a server may call a .tar.gz gzip-encoded, and it must not be unpacked.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with session.stream("GET", url, headers=headers) as answer:
        if answer.status_code == 416:  # nothing is left to send: the digest will tell
            return
        answer.raise_for_status()
        if start and answer.status_code != 206:
            growing.empty()
            start = 0
        size = limit or start + int(answer.headers.get("Content-Length", 0))
        check_size(shown(url), size)
        for chunk in answer.iter_raw():  # of any size: what came before a broken line is kept
            growing.write(chunk)
            start += len(chunk)
            progress(start, size)
            if limit is not None and start > limit:
                return
            check_size(shown(url), start)
