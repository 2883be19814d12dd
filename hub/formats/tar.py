"""Reading tar archives by offset: no name in an archive decides where a file is written."""

from __future__ import annotations

import re
from pathlib import Path

from experthub.hub.errors import IntegrityError

BLOCK = 512
FILE, FOLDER, COMMENTS = b"0\0", b"5", b"xg"  # The kinds of members in a header.
HINT = "get the archive again, or write it again with hub export"


def list_members(path: Path) -> dict[str, tuple[int, int]]:
    """List the plain files of an uncompressed archive.

    Args:
        path: The path of the archive.

    Returns:
        The offset and the size of the bytes of each file by name.

    Raises:
        IntegrityError: The archive is cut or has a wrong checksum, has a link or a device, or has
            two files with one name.
    """
    found: dict[str, tuple[int, int]] = {}
    whole = path.stat().st_size
    offset = 0
    with path.open("rb") as file:
        while True:
            file.seek(offset)
            header = file.read(BLOCK)
            if header == bytes(BLOCK):
                return found
            try:
                name, kind, size = _parse_header(header)
            except ValueError as fact:
                raise IntegrityError(f"{path} is damaged at byte {offset}: {fact}", HINT) from None
            start = offset + BLOCK
            offset = start + -(-size // BLOCK) * BLOCK
            if offset > whole:
                raise IntegrityError(f"{path} is cut: {name!r} is incomplete", HINT)
            if kind in FILE:
                if name in found:
                    raise IntegrityError(f"{path} has two files {name!r}", HINT)
                found[name] = (start, size)
            elif kind not in FOLDER and kind not in COMMENTS:
                raise IntegrityError(f"{path}: {name!r} is not a plain file", HINT)


def _parse_header(block: bytes) -> tuple[str, bytes, int]:
    """Parse the name, the kind and the size of a member from its header."""
    if len(block) < BLOCK:
        raise ValueError("the archive is cut")
    if block[257:262] != b"ustar":
        raise ValueError("it is not a tar archive, or is compressed")
    stated = _parse_number(block[148:156])
    if stated != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        raise ValueError("the checksum of a header does not match")
    name = block[:100].partition(b"\0")[0].decode("ascii")
    return name.removeprefix("./"), block[156:157], _parse_number(block[124:136])


def _parse_number(field: bytes) -> int:
    """Parse a number in octal digits or, for large files, in base 256."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"{field!r} is not a number")
    return int(digits or b"0", 8)
