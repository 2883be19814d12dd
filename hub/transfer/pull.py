"""Pulling: fetch the content of experts from their sources into the store."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from experthub.hub.conversion.opening import open_native
from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.registry.content import Content
from experthub.hub.registry.expert import Identity
from experthub.hub.session import Session
from experthub.hub.transfer.sources import open_source


def pull(session: Session, *contents: Content) -> list[Identity]:
    """Fetch contents into the store, unless they are there and complete.

    The contents are protected from collection for as long as this process runs. The sources of each
    content are tried in order.

    Args:
        session: The store and the progress callback.
        *contents: The contents.

    Returns:
        The identity of each content, in the same order.

    Raises:
        HubError: All sources of a content failed. The error is the one of the first source.
    """
    store = session.store
    store.hold(*(content.digest for content in contents))
    found = []
    for content in contents:
        try:
            found.append(store.read_identity(content.digest))
        except NotFoundError:
            fetch(content, session)
            found.append(store.read_identity(content.digest))
    return found


def fetch(content: Content, session: Session, renew: Set[str] = frozenset()) -> None:
    """Fetch one content into the store, even if it is stored already.

    Args:
        content: The content.
        session: The store and the progress callback.
        renew: The sha256 of damaged objects, which are replaced.

    Raises:
        HubError: All sources failed. The error is the one of the first source.
    """
    problems: list[HubError] = []
    for source in content.sources:
        try:
            session.report(f"pulling {content.reference} from {source}", 0, 0)
            with (
                open_source(source, Path.cwd(), session.report) as opened,
                open_native(opened, session) as native,
            ):
                found = native.opened
                session.store.add(found.folder, content.digest, renew, found.hashed)
            return
        except HubError as error:
            problems.append(error)
    first = problems[0]
    first.message = f"cannot pull {content.reference}: {first.message}"
    raise first
