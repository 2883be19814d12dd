"""The comparison of the weights that a base stores with those that its model uses."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import compare_names
from experthub.hub.errors import HubError
from experthub.hub.files.atomic import hub_home, write_json
from experthub.hub.files.digests import digest_of
from experthub.hub.files.json_files import read_json


@dataclass(frozen=True)
class StoredNames:
    """The comparison of the weights that a base stores with those that its model uses.

    Attributes:
        missing: The weights of the model that the files lack, with their shapes.
        unused: The names of the stored weights that the model does not use.
    """

    missing: dict[str, tuple[int, ...]]
    unused: tuple[str, ...]


_known: dict[str, StoredNames] = {}  # By the key of the cache.


def compare_stored(base: Base) -> StoredNames:
    """Compare the weights that a base stores with those that its model uses.

    The answer is cached for the base's digest and the version of transformers, whose code decides.

    Args:
        base: The base.

    Returns:
        The weights that are missing or not used.

    Raises:
        HubError: Transformers cannot build the model, or a shape differs.
    """
    key = digest_of([base.digest, version("transformers")])[7:23]
    if key not in _known:
        cache = hub_home() / "fingerprints" / f"names-{key}.json"
        found = _read_cache(cache)
        if found is None:
            missing, unused = compare_names(base)
            found = [{name: list(shape) for name, shape in missing.items()}, unused]
            if not missing:
                write_json(cache, {"names": found, "check": digest_of(found)})
        shapes = {name: tuple(shape) for name, shape in found[0].items()}
        _known[key] = StoredNames(shapes, tuple(found[1]))
    return _known[key]


def _read_cache(cache: Path) -> list[Any] | None:
    """Return the cached names; None if there are none or the file is damaged."""
    try:
        record: dict[str, Any] = read_json(cache) if cache.is_file() else {}
    except HubError:
        return None
    found = record.get("names")
    intact = isinstance(found, list) and record.get("check") == digest_of(found)
    return found if intact else None
