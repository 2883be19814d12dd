"""Loading of all plug-ins: the kinds, merges and routers of other packages."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from experthub.hub.kinds import kinds


def load_plugins() -> list[str]:
    """Load every kind, merge and router of another package.

    Torch is imported only if there is a merge or a router.

    Returns:
        The names of the entry points, sorted.

    Raises:
        HubError: A kind cannot be loaded.
        ImportError: A merge or a router cannot be loaded.
    """
    len(kinds)  # The length needs all kinds.
    broken: dict[str, Exception] = dict(kinds.broken)
    for module, catalogue in (("merge", "merges"), ("routing", "routers")):
        if entry_points(group=f"experthub.{catalogue}"):
            methods = getattr(import_module(f"experthub.{module}"), catalogue)
            len(methods)
            broken |= methods.broken
    for error in broken.values():
        raise error
    groups = ("experthub.kinds", "experthub.merges", "experthub.routers")
    return sorted(point.name for group in groups for point in entry_points(group=group))
