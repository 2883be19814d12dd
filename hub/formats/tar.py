"""Tar archives, read by place only: nothing is ever unpacked by what an archive says."""

from __future__ import annotations

import re
from pathlib import Path

from experthub.hub.errors import IntegrityError

BLOCK = 512
FILE, FOLDER, COMMENTS = b"0\0", b"5", b"xg"  # by the kind that a header states
HINT = "get the archive again, or write it again with hub export"


def list_members(path: Path) -> dict[str, tuple[int, int]]:
    """The plain files of an uncompressed archive: name -> offset and size of its bytes.

    Raises IntegrityError for anything but whole, plain files and folders: a link, a device, a name
    that stands twice, a wrong checksum, a cut archive.
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
                raise IntegrityError(f"{path} is cut: {name!r} is not whole", HINT)
            if kind in FILE:
                if name in found:
                    raise IntegrityError(f"{path} has two files {name!r}", HINT)
                found[name] = (start, size)
            elif kind not in FOLDER and kind not in COMMENTS:
                raise IntegrityError(f"{path}: {name!r} is no plain file", HINT)


def _parse_header(block: bytes) -> tuple[str, bytes, int]:
    """Name, kind and size of a member; ValueError for what is no header."""
    if len(block) < BLOCK:
        raise ValueError("the archive is cut")
    if block[257:262] != b"ustar":
        raise ValueError("this is no tar archive, or a compressed one")
    stated = _parse_number(block[148:156])
    if stated != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        raise ValueError("a header with another checksum than it states")
    name = block[:100].partition(b"\0")[0].decode("ascii")
    return name.removeprefix("./"), block[156:157], _parse_number(block[124:136])


def _parse_number(field: bytes) -> int:
    """A number in octal digits, or, of large files, in base 256."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"{field!r} is no number")
    return int(digits or b"0", 8)
