"""Fetching the content of experts into the store, from wherever their sources are."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.registry.content import Content
from experthub.hub.registry.expert import Identity
from experthub.hub.session import Session
from experthub.hub.transfer.sources import opened


def pull(session: Session, *contents: Content) -> list[Identity]:
    """Fetch contents into the store unless they are there and complete.

    They are not collected while this process runs. The sources of each content are tried in order.

    Args:
        session: The store and the progress callback.
        *contents: The contents to fetch.

    Returns:
        The identity of each content, in the same order.

    Raises:
        HubError: All sources of a content failed; this is the error of the first one.
    """
    store = session.store
    store.hold(*(content.digest for content in contents))  # from now on they are not collected
    found = []
    for content in contents:
        try:
            found.append(store.identity(content.digest))
        except NotFoundError:
            fetch(content, session)
            found.append(store.identity(content.digest))
    return found


def fetch(content: Content, session: Session, renew: Set[str] = frozenset()) -> None:
    """Fetch one content into the store, even if the store has it.

    Args:
        content: The content.
        session: The store and the progress callback.
        renew: sha256 of damaged objects, which are replaced.

    Raises:
        HubError: All sources failed; this is the error of the first one.
    """
    problems: list[HubError] = []
    for source in content.sources:
        try:
            session.report(f"pulling {content.reference} from {source}", 0, 0)
            with opened(source, Path.cwd(), session.report) as (folder, hashed):
                session.store.add(folder, content.digest, renew, hashed)
            return
        except HubError as error:
            problems.append(error)
    first = problems[0]
    first.message = f"cannot pull {content.reference}: {first.message}"
    raise first
