"""Requests to the API of the Hugging Face Hub: endpoint, token, answers and errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.hub.errors import AuthError, HubError, IntegrityError, NotFoundError
from experthub.hub.transfer.remotes._http import read_answer, retry

if TYPE_CHECKING:
    import httpx


def read_endpoint() -> str:
    """Read the address of the Hub from `HF_ENDPOINT`.

    Returns:
        The URL without a slash at the end; huggingface.co by default.
    """
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token_path() -> Path:
    """Return the path of the file in which the Hub's own tools keep the user's token.

    Returns:
        The path, whether the file exists or not.
    """
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")


def read_token() -> str | None:
    """Read the user's token from `HF_TOKEN` or from the token file.

    Returns:
        The token; None if the user has none.

    Raises:
        AuthError: The token has characters that no token has.
    """
    path = token_path()
    stated = os.environ.get("HF_TOKEN", "").strip()
    if not stated and path.is_file():
        stated = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[!-~]*", stated):  # The error must not quote the token.
        raise AuthError(
            "the token has a space, a control character or a letter that is not ASCII",
            "set HF_TOKEN again, or run hf auth login",
        )
    return stated or None


def make_headers() -> dict[str, str]:
    """Make the headers of a request to the Hub. httpx drops the token if the host changes.

    Returns:
        The headers with the user's token; no headers without a token.

    Raises:
        AuthError: The token has characters that no token has.
    """
    known = read_token()
    return {"Authorization": f"Bearer {known}"} if known else {}


def request_json(session: httpx.Client, url: str, source: str) -> tuple[Any, str | None]:
    """Request JSON from the Hub.

    The request is repeated a few times if the connection breaks or the Hub is busy.

    Args:
        session: The client.
        url: The URL.
        source: The source that the request is about, for errors.

    Returns:
        The answer, and the URL of its next page or None.

    Raises:
        AuthError: The repository is gated, or the token may not read it.
        NotFoundError: The repository or the revision does not exist, or is private.
        HubError: The Hub answered with another error, or not with JSON.
        IntegrityError: The answer is too long or compressed, or its next page is on another host.
    """
    import httpx

    try:
        answer, content = retry(lambda: read_answer(session, url, source), lambda: 0)
        return _parse_json(content, source), _find_next_page(answer, url, source)
    except httpx.HTTPStatusError as error:
        answer = error.response
    code, status = answer.headers.get("X-Error-Code", ""), answer.status_code
    if code == "GatedRepo":
        raise AuthError(f"{source} is gated", "ask its owner for access, and set HF_TOKEN")
    if code in ("RepoNotFound", "RevisionNotFound") or status == 404:
        raise NotFoundError(
            f"{source} does not exist, or is private", "check the name, or set HF_TOKEN"
        )
    if status in (401, 403):
        raise AuthError(f"{source} answered {status}", "check HF_TOKEN")
    raise HubError(f"{source} answered {status}", "try again later, or check HF_ENDPOINT")


def _find_next_page(answer: httpx.Response, asked: str, source: str) -> str | None:
    """Return the URL of the next page. It must be on the same host, which gets the token, too."""
    link = answer.links.get("next", {}).get("url")
    if not link:
        return None
    url, here = answer.url.join(link), answer.url.join(asked)
    if (url.scheme, url.host, url.port) != (here.scheme, here.host, here.port):
        raise IntegrityError(
            f"{source}: the next page of its file list is on another host", "check HF_ENDPOINT"
        )
    return str(url)


def _parse_json(content: bytes, source: str) -> Any:
    """Parse an answer as JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise HubError(f"{source}: the answer is not JSON", "check HF_ENDPOINT") from None
