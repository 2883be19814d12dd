"""Writing to the Hugging Face Hub, by its own client: one atomic commit on a known parent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from experthub.hub.errors import AuthError, ConflictError, HubError, NotFoundError, UsageError
from experthub.hub.transfer.remotes._hf_api import endpoint, token
from experthub.hub.transfer.remotes._hf_files import HfSource
from experthub.hub.transfer.remotes._http import check_online

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def target(text: str) -> HfSource:
    """Where to push; UsageError for anything but `hf:org/name[@branch]`."""
    if not text.startswith("hf:"):
        raise UsageError(
            f"cannot push to {text!r}", "write hf:org/name, hf:org/name@branch or file:DIR"
        )
    return HfSource.parse(text)


def push(
    place: HfSource,
    content: Mapping[str, Path | bytes],
    message: str,
    *,
    private: bool,
    tag: str | None,
) -> str:
    """Commit files, by name; returns the commit.  What is there already is not sent again."""
    name = f"hf:{place.repository}"
    check_online(name)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=endpoint(), token=token())
    try:
        api.create_repo(place.repository, private=private or None, exist_ok=True)
        if place.revision != "main":
            api.create_branch(place.repository, branch=place.revision, exist_ok=True)
        parent = api.model_info(place.repository, revision=place.revision).sha
        files = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
            for name, data in sorted(content.items())
        ]
        made = api.create_commit(
            place.repository,
            files,
            commit_message=message,
            revision=place.revision,
            parent_commit=parent,
        )
        if tag:
            api.create_tag(place.repository, tag=tag, revision=made.oid)
    except HFValidationError as error:
        raise UsageError(f"{name} is no repository: {error}", "write hf:org/name") from None
    except HfHubHTTPError as error:
        raise _in_words(error, name) from None
    except _no_answer() as error:
        raise HubError(
            f"cannot push to {name}: {' '.join(str(error).split())[:200]}",
            "check the network and HF_ENDPOINT; pushing again sends only what is missing",
        ) from None
    return str(made.oid)


def _no_answer() -> tuple[type[Exception], ...]:
    """What the client lets through when no answer comes; its versions use different packages."""
    found: list[type[Exception]] = [OSError]
    for package in ("httpx", "httpx2"):
        with suppress(ImportError):
            found.append(import_module(package).HTTPError)
    return tuple(found)


def _in_words(error: HfHubHTTPError, name: str) -> HubError:
    """An error of the Hub, as what to do about it."""
    status = error.response.status_code
    if status in (401, 403):
        return AuthError(
            f"{name} answered {status}", "set HF_TOKEN to a token that may write there"
        )
    if status == 404:
        return NotFoundError(f"{name} does not exist for you", "check the name and HF_TOKEN")
    if status in (409, 412):
        return ConflictError(
            f"somebody else pushed to {name} meanwhile",
            f"look at it (hub pull {name}), and push again",
        )
    return HubError(
        f"cannot push to {name}: {' '.join(str(error).split())[:200]}", "try again later"
    )
