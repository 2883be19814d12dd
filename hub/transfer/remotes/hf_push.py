"""Writing to the Hugging Face Hub by its own client: one atomic commit on a known parent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from experthub.hub.errors import AuthError, ConflictError, HubError, NotFoundError, UsageError
from experthub.hub.transfer.remotes._hf_api import read_endpoint, read_token
from experthub.hub.transfer.remotes._hf_files import HfSource
from experthub.hub.transfer.remotes._limits import check_online

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def parse_target(text: str) -> HfSource:
    """Parse the target of a push.

    Args:
        text: `hf:org/name[@branch]`.

    Returns:
        The repository and the branch.

    Raises:
        UsageError: The text has another form.
    """
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
    """Commit files to a repository. Files that it has already are not sent again.

    Args:
        place: The repository and the branch, which are created if they do not exist.
        content: The files by name: their paths, or their bytes.
        message: The message of the commit.
        private: Create the repository as private if it does not exist.
        tag: A tag for the commit, or None.

    Returns:
        The commit.

    Raises:
        UsageError: The name of the repository is malformed.
        AuthError: The token may not write to the repository.
        NotFoundError: The repository does not exist for this user.
        ConflictError: Somebody else pushed to the branch meanwhile.
        HubError: The Hub did not answer, or answered with another error.
    """
    name = f"hf:{place.repository}"
    check_online(name)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=read_endpoint(), token=read_token())
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
        raise UsageError(f"{name} is not a repository: {error}", "write hf:org/name") from None
    except HfHubHTTPError as error:
        raise _explain_answer(error, name) from None
    except _list_transport_errors() as error:
        raise HubError(
            f"cannot push to {name}: {' '.join(str(error).split())[:200]}",
            "check the network, the proxy and HF_ENDPOINT; pushing again sends only what is missing",
        ) from None
    return str(made.oid)


def _list_transport_errors() -> tuple[type[Exception], ...]:
    """List the errors of the client if no answer arrives; its versions use several packages."""
    found: list[type[Exception]] = [OSError, ImportError, ValueError]  # The last two: a bad proxy.
    for package in ("httpx", "httpx2"):
        with suppress(ImportError):
            client = import_module(package)
            found += [client.HTTPError, client.InvalidURL]
    return tuple(found)


def _explain_answer(error: HfHubHTTPError, name: str) -> HubError:
    """Convert an error of the Hub to an error with a hint."""
    status = error.response.status_code
    if status in (401, 403):
        return AuthError(
            f"{name} answered {status}", "set HF_TOKEN to a token with write permission"
        )
    if status == 404:
        return NotFoundError(f"{name} does not exist for you", "check the name and HF_TOKEN")
    if status in (409, 412):
        return ConflictError(
            f"somebody else pushed to {name} meanwhile",
            f"look at the new commit (hub pull {name}), and push again",
        )
    return HubError(
        f"cannot push to {name}: {' '.join(str(error).split())[:200]}", "try again later"
    )
