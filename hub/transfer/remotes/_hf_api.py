"""What is asked of a model hub, as whom, and what its answers mean."""

from __future__ import annotations

import json
import os
import re
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experthub.hub.errors import AuthError, HubError, IntegrityError, NotFoundError
from experthub.hub.transfer.remotes._http import again

if TYPE_CHECKING:
    import httpx

LONGEST = 16 << 20  # bytes of an answer that is no file


def endpoint() -> str:
    """Where the Hub is: `HF_ENDPOINT`, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token_path() -> Path:
    """Where the Hub's own tools keep the user's token."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")


def token() -> str | None:
    """The user's token: a variable or a file; AuthError for what cannot be one."""
    path = token_path()
    stated = os.environ.get("HF_TOKEN", "").strip()
    if not stated and path.is_file():
        stated = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[!-~]*", stated):  # an error that quotes it would tell it
        raise AuthError(
            "the token has a space, a control character or a letter that no token has",
            "set HF_TOKEN again, or run hf auth login",
        )
    return stated or None


def headers() -> dict[str, str]:
    """What every request to the Hub carries; httpx drops the token on the way to another host."""
    known = token()
    return {"Authorization": f"Bearer {known}"} if known else {}


def ask(session: httpx.Client, url: str, source: str) -> tuple[Any, str | None]:
    """An answer of the Hub, and where the next page of it is; its errors in words."""
    for tries in count(1):
        with session.stream("GET", url) as answer:
            if answer.is_success:
                return _json(_content(answer, source), source), _next(answer, url, source)
        if not again(answer, tries):
            break
    code, status = answer.headers.get("X-Error-Code", ""), answer.status_code
    if code == "GatedRepo":
        raise AuthError(f"{source} is gated", "ask for access and set HF_TOKEN")
    if code in ("RepoNotFound", "RevisionNotFound") or status == 404:
        raise NotFoundError(
            f"{source} does not exist, or is private", "check the name, or set HF_TOKEN"
        )
    if status in (401, 403):
        raise AuthError(f"{source} answered {status}", "check HF_TOKEN")
    raise HubError(f"{source} answered {status}", "try again later, or check HF_ENDPOINT")


def _content(answer: httpx.Response, source: str) -> bytearray:
    content = bytearray()
    for chunk in answer.iter_bytes():
        content += chunk
        if len(content) > LONGEST:
            raise IntegrityError(f"{source}: an answer without an end", "check HF_ENDPOINT")
    return content


def _next(answer: httpx.Response, asked: str, source: str) -> str | None:
    """The address of the next page, at the same host: the token is sent there as well."""
    link = answer.links.get("next", {}).get("url")
    if not link:
        return None
    url, here = answer.url.join(link), answer.url.join(asked)
    if (url.scheme, url.host, url.port) != (here.scheme, here.host, here.port):
        raise IntegrityError(f"{source}: its list goes on at another host", "check HF_ENDPOINT")
    return str(url)


def _json(content: bytearray, source: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise HubError(f"{source}: an answer that is no JSON", "check HF_ENDPOINT") from None
