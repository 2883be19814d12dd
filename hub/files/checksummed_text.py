"""Text files that the hub writes and people may edit: their last line shows a flipped bit.

Whoever edits one removes that line; the text then counts as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError
from experthub.hub.files import yaml_files
from experthub.hub.files.atomic import write_text

LINE = "# sha256 of the lines above; remove this line if you edit them: "
SEAL = re.compile(re.escape(LINE.encode()) + rb"([0-9a-f]{64})\n")
MANIFEST = "files.yaml"  # of a folder that was fetched or imported: its files, by sha256
MENDABLE = 1 << 16  # bytes


def write(path: Path, text: str) -> None:
    """Write a sealed text file, atomically."""
    write_text(path, f"{text}{LINE}{hashlib.sha256(text.encode()).hexdigest()}\n")


def is_whole(content: bytes) -> bool:
    """Whether a text is as it was sealed; one without a seal is."""
    start = content.rfind(b"\n", 0, -1) + 1
    last = content[start:]
    if not (last.startswith(b"#") and len(last) == len(LINE) + 65):
        return True
    found = SEAL.fullmatch(last)
    return bool(found and found.group(1).decode() == hashlib.sha256(content[:start]).hexdigest())


def is_sealed(content: bytes) -> bool:
    """Whether a text has a seal, and is as it was sealed."""
    return SEAL.fullmatch(content[content.rfind(b"\n", 0, -1) + 1 :]) is not None and is_whole(
        content
    )


def mended(content: bytes, right: Callable[[bytes], bool] = is_sealed) -> bytes | None:
    """A small file with the one flipped bit put back; None when it is not one bit."""
    if len(content) > MENDABLE:
        return None
    for place in range(len(content)):
        for bit in range(8):
            found = bytearray(content)
            found[place] ^= 1 << bit
            if right(bytes(found)):
                return bytes(found)
    return None


def write_manifest(folder: Path, files: Mapping[str, str], source: str | None = None) -> None:
    """Say in a folder what belongs in it.  files: name -> sha256.  source: where it came from."""
    record: dict[str, Any] = {"files": dict(sorted(files.items()))}
    write(folder / MANIFEST, yaml_files.dump(record | ({"source": source} if source else {})))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder's manifest says, a flipped bit in it put back; None when it cannot be read."""
    try:
        content = (folder / MANIFEST).read_bytes()
        whole = content if is_sealed(content) else mended(content)
        record = yaml_files.parse(whole.decode(), MANIFEST).value if whole else None
    except (OSError, HubError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None
