"""The comparison of the weights that a base stores with those that its model uses."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import compare_names, refuse_missing
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, write_json
from experthub.hub.files.digests import digest_of
from experthub.hub.files.json_files import read_json

_known: dict[str, list[str]] = {}  # The unused weights of complete bases, by the key of the cache.


def find_unused_weights(base: Base) -> list[str]:
    """Find the stored weights that a base's model does not use; refuse a base that lacks weights.

    The answer is cached for the base's digest and the version of transformers, whose code decides.

    Args:
        base: The base.

    Returns:
        The names of the weights.

    Raises:
        IntegrityError: The files lack a weight of the model.
        HubError: Transformers cannot build the model, or a shape differs.
    """
    key = digest_of([base.digest, version("transformers")])[7:23]
    if key not in _known:
        cache = hub_home() / "fingerprints" / f"unused-{key}.json"
        found = _read_cache(cache)
        if found is None:
            missing, found = compare_names(base)
            refuse_missing(base, missing)
            write_json(cache, {"unused": found, "check": digest_of(found)})
        _known[key] = found
    return _known[key]


def _read_cache(cache: Path) -> list[str] | None:
    """Return the cached names; None if there are none or the file is damaged."""
    try:
        record: dict[str, Any] = read_json(cache) if cache.is_file() else {}
    except HubError:
        return None
    found = record.get("unused")
    intact = isinstance(found, list) and record.get("check") == digest_of(found)
    return found if intact else None
