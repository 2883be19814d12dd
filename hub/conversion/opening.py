"""Opening the source of an expert: an adapter that another program wrote is converted on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from experthub.hub.conversion.found_adapter import FoundAdapter, find_adapter
from experthub.hub.conversion.missing_modules import describe_missing
from experthub.hub.files.atomic import hub_home, open_draft_folder
from experthub.hub.formats.lora_config import list_ignored_keys
from experthub.hub.session import Session
from experthub.hub.transfer.sources import OpenedSource


@dataclass(frozen=True)
class NativeFolder:
    """A folder in one of the hub's own kinds.

    Args:
        opened: The folder, and what is known of it.
        made_from: The record of the conversion, or an empty mapping if there was none.
        base: The name of the base of a converted adapter, if the adapter or the user names it.
    """

    opened: OpenedSource
    made_from: dict[str, Any] = field(default_factory=dict)
    base: str | None = None


@contextmanager
def open_native(
    opened: OpenedSource, session: Session, base: str | None = None, subfolder: str = ""
) -> Iterator[NativeFolder]:
    """Convert the adapter in an opened source if its files are not the hub's own.

    Only conversions that are exact, and need nothing but the base that the adapter names, are made.

    Args:
        opened: The opened source.
        session: The registry and the progress callback, which also gets notes.
        base: The base; the default is the one that the adapter names.
        subfolder: The sub-folder that holds the adapter, if there are several.

    Yields:
        The folder of the source, or a draft that is removed after the block.

    Raises:
        HubError: The folder holds no adapter, or several, or one that cannot be converted.
    """
    if not opened.folder.exists() or opened.stated:
        yield NativeFolder(opened)
        return
    found = find_adapter(opened.folder, subfolder)
    _note(found, session, base)
    if found.is_native:
        same = found.folder == opened.folder or found.format == "hub"
        inner = (
            opened if same and not subfolder else OpenedSource(found.folder, MappingProxyType({}))
        )
        yield NativeFolder(inner)
        return
    from experthub.hub.conversion.convert import convert_into

    with open_draft_folder(hub_home() / "drafts" / "converted") as draft:
        kind, made_from, notes = convert_into(found, draft, session, base=base)
        what = f"{made_from['type']} of {made_from['format']}"
        session.report(
            f"note: converted {found.folder}, {what}, into a {kind.replace('_', ' ')}", 0, 0
        )
        for text in notes:
            session.report(f"note: {text}", 0, 0)
        named = str(base or made_from.pop("base", None) or "") or None
        if named and session.registry.has_base(named):
            named = session.registry.find_base(named)[0]
        yield NativeFolder(OpenedSource(draft, MappingProxyType({})), made_from, named)


def _note(found: FoundAdapter, session: Session, base: str | None) -> None:
    """Report the keys that are ignored, and modules that the configuration targets in vain."""
    if found.format != "peft":
        return
    ignored = list_ignored_keys(found.config) if found.is_native else []
    if ignored:
        text = f"note: {found.folder}: ignored the unused keys {', '.join(ignored)}"
        session.report(text, 0, 0)
    missing = describe_missing(found, base or None, session.registry)
    if missing:
        session.report(f"note: {found.folder}: {missing}", 0, 0)
