"""The names of the files that experts have."""

from __future__ import annotations

from experthub.hub.formats.adapter import GATES
from experthub.hub.kinds import kinds
from experthub.hub.kinds.prompt import SOFT_PROMPT
from experthub.hub.registry.expert import DESCRIPTION


def list_file_patterns() -> tuple[str, ...]:
    """List the names of the files by which fetched folders are named: those of earlier versions.

    Returns:
        Shell patterns. Folders that were fetched from a model hub are named after a hash of the
        patterns in this order, so the order must not change.
    """
    changes = [name for kind in kinds.values() if kind.load for name in kind.files]
    rest = [kind for kind in kinds.values() if not kind.load and kind is not SOFT_PROMPT]
    others = [name for kind in rest for name in kind.files]
    return (*changes, GATES, *others, DESCRIPTION)


def list_fetched_files() -> tuple[str, ...]:
    """List the names of the files that are fetched with an expert of any kind.

    Returns:
        Shell patterns, those of `list_file_patterns` first.
    """
    more = [name for kind in kinds.values() for name in kind.companions]
    return (*list_file_patterns(), *dict.fromkeys([*more, *SOFT_PROMPT.files]))
