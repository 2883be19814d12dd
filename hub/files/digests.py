"""Checksums of files and of plain values, and reading in chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


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
