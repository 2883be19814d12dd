"""JSON files that are read with checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experthub.hub.errors import IntegrityError

MAX_JSON_BYTES = 64 << 20  # The longest JSON files list the tensors of the largest models.


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.

    Returns:
        The object as a mapping.

    Raises:
        IntegrityError: The file is too large, or is not a JSON object.
    """
    try:
        value = json.loads(read_small(path).decode())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}", "fetch it again from its source"
        ) from None
    if not isinstance(value, dict):
        raise IntegrityError(
            f"{path} is damaged: not a JSON object", "fetch it again from its source"
        )
    return value


def read_small(path: Path) -> bytes:
    """Read a file of at most `MAX_JSON_BYTES` bytes.

    Args:
        path: The file.

    Returns:
        Its bytes.

    Raises:
        IntegrityError: The file is larger.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise IntegrityError(
            f"{path} has more than {MAX_JSON_BYTES} bytes", "check that it is the right file"
        )
    return path.read_bytes()
