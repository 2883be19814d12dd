"""The error for a plug-in that cannot be loaded, and the report of it."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint


class PluginError(ImportError):
    """An error for an entry point of another package that cannot be loaded.

    Args:
        point: The entry point.
        error: The error that was raised while it was loaded.

    Attributes:
        hint: The next step: a sentence that starts with a verb.
    """

    def __init__(self, point: EntryPoint, error: BaseException) -> None:
        package = point.dist.name if point.dist else point.value
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        place = f"the entry point {point.name!r} ({point.group}) of the package {package}"
        super().__init__(f"{place} cannot be loaded: {reason}")
        self.hint = f"repair or uninstall {package}"


def report_broken(point: EntryPoint, error: BaseException) -> PluginError:
    """Report once on standard error that an entry point cannot be loaded and is left out.

    Args:
        point: The entry point.
        error: The error that was raised while it was loaded.

    Returns:
        The error for those who use what the entry point would have added.
    """
    made = PluginError(point, error)
    shown = "".join(c if c.isprintable() else "?" for c in f"{made}; {made.hint}")
    logging.getLogger("experthub").warning("warning: %s", shown)
    return made
