"""The report of a package of kinds that cannot be loaded."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint

from experthub.hub.errors import HubError
from experthub.hub.files.safe_text import escape


def report_broken_kind(point: EntryPoint, error: BaseException) -> HubError:
    """Report once on standard error that an entry point cannot be loaded and is left out.

    The catalogues of methods do the same with their `PluginError`; importing that loads torch.

    Args:
        point: The entry point.
        error: The error that was raised while it was loaded.

    Returns:
        The error for those who use a kind that the entry point would have added.
    """
    package = point.dist.name if point.dist else point.value
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    place = f"the entry point {point.name!r} ({point.group}) of the package {package}"
    made = HubError(f"{place} cannot be loaded: {reason}", f"repair or uninstall {package}")
    logging.getLogger("experthub").warning("warning: %s", escape(f"{made}; {made.hint}"))
    return made
