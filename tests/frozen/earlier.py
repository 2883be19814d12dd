"""Write what the present version gives as version 1 of digests and locks wrote it.

The goldens are of version 1, which of a base covered the weights only. Version 2 adds the base's
digest and commit and the encoders to locks, and the weights that are not used to plans. Without
them, and with the digests of version 1 in the place of those of version 2, everything is as it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from experthub import hub

SEAL = re.compile(r"(# sha256 .*: )[0-9a-f]{64}\n\Z")


@cache
def earlier_digests(project: Path) -> dict[str, str]:
    """Return the digests of version 1 by those of version 2, of a store's recipes and bases."""
    from experthub.hub.bases.base_sources import find

    session = hub.Session(hub.Registry.read())
    found = {}
    for path in sorted(project.glob("*.yaml")):
        if path.name == "registry.yaml" or path.name.endswith(".lock.yaml"):
            continue
        plan = hub.plan_of(path, session=session)
        found[plan.digest] = plan.weights_digest
        found[plan.digest[7:23]] = plan.weights_digest[7:23]  # in names of folders
    encoder = find("encoder", session)
    return found | {encoder.digest: encoder.fingerprint}


def earlier_text(text: str, project: Path) -> str:
    """Return a text with the digests of version 1."""
    for new, old in earlier_digests(project).items():
        text = text.replace(new, old)
    return text


def earlier_lock(text: str, project: Path) -> str:
    """Return a lock as version 1 wrote it, sealed again."""
    above, seal = SEAL.sub("", text), SEAL.search(text)
    above = re.sub(r"\Aversion: 2\n", "version: 1\n", above)
    above = re.sub(r"(?m)(^  fingerprint: .*\n)  digest: .*\n", r"\1", above)
    above = re.sub(r"(?m)^  commit: .*\n", "", above)
    above = re.sub(r"(?m)^encoders:\n(?:  .*\n)*", "", above)
    above = earlier_text(above, project)
    sealed = hashlib.sha256(above.encode()).hexdigest()
    return above + (f"{seal[1]}{sealed}\n" if seal else "")


def earlier_values(value: Any, project: Path) -> Any:
    """Return what a command printed as version 1 printed it."""
    return json.loads(earlier_text(json.dumps(_without_new_keys(value)), project))


def _without_new_keys(value: Any) -> Any:
    """Remove what version 2 added, from locks and plans anywhere in plain values."""
    if isinstance(value, list):
        return [_without_new_keys(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _without_new_keys(inner) for key, inner in value.items()}
    kept.pop("unused_weights", None)
    if "composition" in kept and kept.get("version") == 2:
        kept["version"] = 1
        kept.pop("encoders", None)
        kept["base"] = {k: v for k, v in kept["base"].items() if k not in ("digest", "commit")}
    return kept
