"""The session in which a command runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from experthub.cli._output import show_progress

if TYPE_CHECKING:
    from experthub.hub.session import Session


@contextmanager
def open_session(registry: Path | None = None, device: str | None = None) -> Iterator[Session]:
    """Open a session that shows its progress while the block lasts.

    Args:
        registry: A registry file that is searched first, from `--registry`.
        device: The torch device, from `--device`.

    Yields:
        The session, with the store under `$HUB_HOME`.
    """
    from experthub.hub.registry.registry import Registry
    from experthub.hub.session import Session

    known = None if registry is None else Registry.read(registry)
    with show_progress() as report:
        yield Session(known, device=device, report=report)
