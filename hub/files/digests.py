"""Checksums of files and of plain values, JSON without NaN, and reading in chunks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from experthub.hub.errors import IntegrityError

CHUNK = 1 << 20  # bytes


def read_chunks(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    """Read a region of a file in chunks of at most `CHUNK` bytes.

    Args:
        file: The open file.
        offset: The first byte of the region.
        size: The number of bytes.

    Yields:
        The chunks; fewer bytes if the file ends before the region.
    """
    file.seek(offset)
    while size and (chunk := file.read(min(size, CHUNK))):
        size -= len(chunk)
        yield chunk


def sha256_of(path: Path) -> str:
    """Compute the sha256 checksum of a file.

    Args:
        path: The file, which is read in blocks.

    Returns:
        The checksum as 64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object) -> bytes:
    """Encode a value as JSON in exactly one way, so that equal values have equal bytes.

    Args:
        value: Plain values: mappings, lists, texts, numbers, booleans and None.

    Returns:
        JSON in UTF-8 with sorted keys and without spaces.
    """
    return encode_json(value, sort_keys=True, separators=(",", ":")).encode()


def encode_json(value: object, **options: Any) -> str:
    """Encode a value as JSON, which has no NaN and no infinity.

    Args:
        value: Plain values: mappings, lists, texts, numbers, booleans and None.
        **options: Options of `json.dumps`.

    Returns:
        The JSON text; characters that are not ASCII are kept.

    Raises:
        IntegrityError: A number is NaN or infinite. The message names its place.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    except ValueError:
        for place, number in find_not_finite(value):
            raise IntegrityError(
                f"{place} is {number}, which is not a finite number",
                "check the weights and numbers that it was computed from",
            ) from None
        raise


def find_not_finite(value: object, place: str = "") -> Iterator[tuple[str, float]]:
    """Find the numbers in plain values that are NaN or infinite.

    Args:
        value: The values.
        place: The place of the value, for the names of the places below it.

    Yields:
        The place of each such number, such as `scores[0].base`, and the number.
    """
    if isinstance(value, dict):
        for key, own in value.items():
            yield from find_not_finite(own, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for number, own in enumerate(value):
            yield from find_not_finite(own, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, value


def replace_not_finite(value: Any) -> Any:
    """Replace NaN and infinity in plain values by None.

    Args:
        value: The values.

    Returns:
        The values with None in their place.
    """
    if isinstance(value, dict):
        return {key: replace_not_finite(own) for key, own in value.items()}
    if isinstance(value, list):
        return [replace_not_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_json(value: object) -> str:
    """Format a value as indented JSON for people.

    Args:
        value: Plain values.

    Returns:
        The JSON text with a newline at its end.

    Raises:
        IntegrityError: A number is NaN or infinite.
    """
    return encode_json(value, indent=2) + "\n"


def digest_of(value: object) -> str:
    """Compute the digest of a value from its canonical JSON.

    Args:
        value: Plain values, as in `canonical_json`.

    Returns:
        `sha256:` and 64 hexadecimal digits.

    Example:
        >>> digest_of({"b": 1, "a": 2}) == digest_of({"a": 2, "b": 1})
        True
    """
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()
