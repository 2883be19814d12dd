"""Text files with a checksum in their last line, which reveals a flipped bit.

People may edit these files. Whoever edits one removes the last line, and the text is then used
without a check.
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
from experthub.hub.files.digests import sha256_of

LINE = "# sha256 of the lines above; remove this line if you edit them: "
SEAL = re.compile(re.escape(LINE.encode()) + rb"([0-9a-f]{64})\n")
MANIFEST = "files.yaml"  # Lists the files of a fetched or imported folder with their sha256.
MAX_REPAIRABLE = 1 << 16  # bytes


def write(path: Path, text: str) -> None:
    """Write a text file and its checksum, atomically.

    Args:
        path: The file.
        text: Its content, which ends with a newline.
    """
    write_text(path, f"{text}{LINE}{hashlib.sha256(text.encode()).hexdigest()}\n")


def is_whole(content: bytes) -> bool:
    """Tell whether a text is undamaged.

    Args:
        content: The bytes of the file.

    Returns:
        Whether the checksum matches; True for a text without a checksum.
    """
    start = content.rfind(b"\n", 0, -1) + 1
    last = content[start:]
    if not (last.startswith(b"#") and len(last) == len(LINE) + 65):
        return True
    found = SEAL.fullmatch(last)
    return bool(found and found.group(1).decode() == hashlib.sha256(content[:start]).hexdigest())


def is_sealed(content: bytes) -> bool:
    """Tell whether a text has a checksum that matches.

    Args:
        content: The bytes of the file.

    Returns:
        Whether the checksum is there and matches.
    """
    return SEAL.fullmatch(content[content.rfind(b"\n", 0, -1) + 1 :]) is not None and is_whole(
        content
    )


def repair_bit(content: bytes, right: Callable[[bytes], bool] = is_sealed) -> bytes | None:
    """Repair a small file in which one bit was flipped, by trying every bit.

    Args:
        content: The damaged bytes.
        right: Tells whether bytes are undamaged.

    Returns:
        The repaired bytes; None if the file is too large or no single bit repairs it.
    """
    if len(content) > MAX_REPAIRABLE:
        return None
    for place in range(len(content)):
        for bit in range(8):
            found = bytearray(content)
            found[place] ^= 1 << bit
            if right(bytes(found)):
                return bytes(found)
    return None


def find_changed_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Find the files of a folder that are missing or have another checksum.

    Args:
        folder: The folder.
        files: The sha256 of each file by name.

    Returns:
        The names of the files.
    """
    return [
        name
        for name, sha256 in files.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256
    ]


def write_manifest(folder: Path, files: Mapping[str, str], source: str | None = None) -> None:
    """Write a folder's manifest, which lists its files and their checksums.

    Args:
        folder: The folder.
        files: The sha256 of each file by name.
        source: The place that the files came from.
    """
    record: dict[str, Any] = {"files": dict(sorted(files.items()))}
    write(folder / MANIFEST, yaml_files.dump(record | ({"source": source} if source else {})))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read a folder's manifest; repair it in memory if one bit was flipped.

    Args:
        folder: The folder.

    Returns:
        The mapping with `files` and perhaps `source`; None if the manifest cannot be read.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
        whole = content if is_sealed(content) else repair_bit(content)
        record = yaml_files.parse(whole.decode(), MANIFEST).value if whole else None
    except (OSError, HubError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None
