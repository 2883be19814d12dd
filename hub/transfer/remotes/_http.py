"""HTTP clients: trusted certificates, errors as sentences, and retries."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from experthub.hub.errors import AuthError, HubError, NotFoundError

if TYPE_CHECKING:
    import httpx

TRIES = 5  # The number of tries in a row that may bring no byte.
WAIT = 0.5  # The seconds before the second try; every later wait is twice as long.
BUSY = (429, 500, 502, 503, 504)


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
            verify=_load_certificates(), follow_redirects=True, timeout=60, headers=headers
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
        size: Returns the number of bytes that arrived so far. A try that brought some bytes is not
            counted as failed.

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
        grew = size() > before
        reached = reached or grew
        tries = TRIES if grew else tries - 1
        if not tries:
            raise failure
        time.sleep(wait)


def _read_retry_after(answer: httpx.Response) -> float:
    """Return the seconds that a server asks to wait, at most a minute."""
    stated = answer.headers.get("Retry-After", "")
    return min(60.0, float(stated)) if re.fullmatch("[0-9]+", stated) else 0.0
