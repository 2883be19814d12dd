"""JSON files: read with checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experthub.hub.errors import IntegrityError

MAX_BYTES = 64 << 20  # the longest JSON files list the tensors of the largest models


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; IntegrityError when the file is damaged."""
    try:
        value = json.loads(read_small(path).decode())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}", "get it again from its source"
        ) from None
    if not isinstance(value, dict):
        raise IntegrityError(
            f"{path} is damaged: not a JSON object", "get it again from its source"
        )
    return value


def read_small(path: Path) -> bytes:
    """Read a small file; IntegrityError when it is larger than `MAX_BYTES`."""
    if path.stat().st_size > MAX_BYTES:
        raise IntegrityError(f"{path} has more than {MAX_BYTES} bytes", "is it the right file?")
    return path.read_bytes()
