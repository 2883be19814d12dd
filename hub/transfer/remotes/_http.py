"""HTTP clients: trusted certificates, bounded answers, errors as sentences, and retries."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from experthub.hub.errors import AuthError, HubError, IntegrityError, NotFoundError
from experthub.hub.transfer.remotes._deadlines import LEAST_PROGRESS, Stopwatch

if TYPE_CHECKING:
    import httpx

TRIES = 5  # The number of tries in a row that may bring fewer than LEAST_PROGRESS bytes.
WAIT = 0.5  # The seconds before the second try; every later wait is twice as long.
BUSY = (429, 500, 502, 503, 504)
MAX_REDIRECTIONS = 20
MAX_ANSWER = 16 << 20  # bytes of an answer that is not a file


@cache
def _load_certificates() -> ssl.SSLContext:
    """Load the system's certificates and certifi's. This takes a tenth of a second."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


@contextmanager
def open_client(headers: dict[str, str] | None = None) -> Iterator[httpx.Client]:
    """Open an HTTP client whose errors become HubError.

    Args:
        headers: The headers of every request. httpx does not send an `Authorization` header to
            another host.

    Yields:
        The client.

    Raises:
        AuthError: The server refused the token.
        NotFoundError: The server does not have what was requested.
        HubError: The proxy cannot be used. Or the server did not answer, or answered with another
            error.
    """
    import httpx

    try:
        client = httpx.Client(
            verify=_load_certificates(),
            timeout=60,
            headers={"Accept-Encoding": "identity"} | (headers or {}),
            # A Stopwatch cuts its own connection.
            limits=httpx.Limits(max_keepalive_connections=0),
        )
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise HubError(
            f"the proxy of the environment cannot be used: {redact_url(error)}",
            "correct HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY: a proxy is http://host:port",
        ) from None
    try:
        with client as session:
            yield session
    except httpx.HTTPStatusError as error:
        raise _explain_status(error) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # A host that is no name.
        url = getattr(getattr(error, "_request", None), "url", "") or "the server"
        raise HubError(
            f"no answer from {redact_url(url)}: {str(error) or type(error).__name__}",
            "check the network, or set HUB_OFFLINE=1 to use only what is stored here",
        ) from None


@contextmanager
def request(
    session: httpx.Client, url: str, headers: dict[str, str] | None = None
) -> Iterator[tuple[httpx.Response, Iterator[bytes]]]:
    """Request a file or another answer, which is never decompressed.

    Args:
        session: The client.
        url: The URL.
        headers: The headers of this request.

    Yields:
        The answer, and the bytes of its body in chunks. Each `LEAST_PROGRESS` bytes must arrive in the
        time of a `Stopwatch`.

    Raises:
        httpx.HTTPError: The server does not answer, or answers with an error.
        HubError: The server answers too slowly.
    """

    def read() -> Iterator[bytes]:
        count = 0
        for chunk in answer.iter_raw():  # Chunks of any size: all bytes before an error are kept.
            count += len(chunk)
            if count >= LEAST_PROGRESS:
                stopwatch.extend()
                count = 0
            yield chunk

    with Stopwatch(redact_url(url)) as stopwatch:
        answer = _follow(session, url, headers, stopwatch)
        with closing(answer):
            answer.raise_for_status()
            yield answer, read()


def _follow(
    session: httpx.Client, url: str, headers: dict[str, str] | None, stopwatch: Stopwatch
) -> httpx.Response:
    """Send a request and follow redirections. Their bodies are not read."""
    import httpx

    asked = session.build_request("GET", url, headers=headers, extensions={"trace": stopwatch})
    for _ in range(MAX_REDIRECTIONS):
        answer = session.send(asked, stream=True)
        if answer.next_request is None:
            return answer
        asked = answer.next_request
        answer.close()
    raise httpx.TooManyRedirects(f"more than {MAX_REDIRECTIONS} redirections", request=asked)


def read_answer(
    session: httpx.Client, url: str, what: str, headers: dict[str, str] | None = None
) -> tuple[httpx.Response, bytes]:
    """Request an answer that is not a file, such as a page of an index.

    Args:
        session: The client.
        url: The URL.
        what: The subject of the request, for errors.
        headers: The headers of this request.

    Returns:
        The answer, and its body.

    Raises:
        httpx.HTTPError: The server does not answer, or answers with an error.
        IntegrityError: The body is compressed, or is longer than `MAX_ANSWER` bytes.
        HubError: The body does not arrive in the time of a `Stopwatch`.
    """
    with request(session, url, headers) as (answer, _):
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise IntegrityError(
                f"{what}: the answer is compressed with {encoding[:40]!r}",
                "use a server or a proxy that honours Accept-Encoding: identity",
            )
        content = bytearray()
        for chunk in answer.iter_raw():
            content += chunk
            if len(content) > MAX_ANSWER:
                raise IntegrityError(
                    f"{what}: the answer is longer than {MAX_ANSWER} bytes",
                    "check the address of the server",
                )
    return answer, bytes(content)


def redact_url(url: object) -> str:
    """Remove the parts of a URL that may be secret: user name, password and signature.

    Args:
        url: The URL.

    Returns:
        The URL without them, for messages.
    """
    return re.sub(r"//[^/?#]*@", "//", str(url)).partition("?")[0]


def _explain_status(error: httpx.HTTPStatusError) -> HubError:
    """Convert an error status to an error with a hint."""
    status, url = error.response.status_code, redact_url(error.request.url)
    if status in (401, 403):
        return AuthError(f"{url} answered {status}", "check your token and your access rights")
    if status in (404, 410):
        return NotFoundError(f"{url} does not exist", "check the name and the version")
    return HubError(f"{url} answered {status}", "try again later")


def retry(call: Callable[[], Any], size: Callable[[], int]) -> Any:
    """Call a function again after errors that may pass: broken connections and busy servers.

    Args:
        call: The function.
        size: Returns the number of bytes that arrived so far. A try that brought `LEAST_PROGRESS` bytes
            is not counted as failed.

    Returns:
        The result of the function.

    Raises:
        httpx.HTTPError: The error of the last try.
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
            wait = max(wait, _read_retry_after(error.response))
            failure: httpx.HTTPError = error
        except httpx.TransportError as error:
            unreachable = isinstance(error, httpx.ConnectError) and not reached
            if unreachable or isinstance(error, httpx.UnsupportedProtocol):
                raise
            failure = error
        grew = size() - before
        reached = reached or grew > 0
        tries = TRIES if grew >= LEAST_PROGRESS else tries - 1
        if not tries:
            raise failure
        time.sleep(wait)


def _read_retry_after(answer: httpx.Response) -> float:
    """Return the seconds that a server asks to wait, at most a minute."""
    stated = answer.headers.get("Retry-After", "")
    return min(60.0, float(stated)) if re.fullmatch("[0-9]+", stated) else 0.0
