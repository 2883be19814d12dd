"""JSON files that are read with checks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from experthub.hub.errors import IntegrityError
from experthub.hub.files.plain_files import open_plain

MAX_JSON_BYTES = 64 << 20  # The longest JSON files list the tensors of the largest models.
MAX_DEPTH = 100


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.

    Returns:
        The object as a mapping.

    Raises:
        IntegrityError: The file is too large or nested too deep, holds a text that is not Unicode,
            or is not a JSON object.
    """
    found: dict[str, Any] = _read_value(path, dict, "object")
    return found


def read_json_list(path: Path) -> list[Any]:
    """Read a JSON list from a file.

    Args:
        path: The file.

    Returns:
        The list.

    Raises:
        IntegrityError: The file cannot be read, see `read_json`, or is not a JSON list.
    """
    found: list[Any] = _read_value(path, list, "list")
    return found


def _read_value(path: Path, kind: type, name: str) -> Any:
    """Read a JSON value of a kind from a file, and check that it could be written again."""
    try:
        text = read_small(path).decode()
        value = json.loads(text)
        _check_values(value, text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}", "fetch it again from its source"
        ) from None
    if not isinstance(value, kind):
        raise IntegrityError(
            f"{path} is damaged: not a JSON {name}", "fetch it again from its source"
        )
    return value


def _check_values(value: Any, text: str) -> None:
    """Raise ValueError for values that could not be written again: too deep, or not Unicode."""
    if re.search(r"\\u[dD][89a-fA-F]", text):  # It may be half of a surrogate pair.
        json.dumps(value, ensure_ascii=False).encode()
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} values are inside of each other")


def read_small(path: Path) -> bytes:
    """Read a file of at most `MAX_JSON_BYTES` bytes.

    Args:
        path: The file.

    Returns:
        Its bytes.

    Raises:
        IntegrityError: The file is larger, or is a pipe, a device or a folder.
    """
    with open_plain(path, follow=True) as file:  # A device has no end, whatever its size says.
        content: bytes = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise IntegrityError(
            f"{path} has more than {MAX_JSON_BYTES} bytes", "check that it is the right file"
        )
    return content
