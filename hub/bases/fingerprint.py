"""The weight files of a model folder, and their fingerprint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.atomic import hub_home, write_json
from experthub.hub.files.digests import CHUNK, canonical_json, digest_of
from experthub.hub.files.json_files import read_json
from experthub.hub.formats.safetensors_header import hash_tensors


def list_weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder.

    Args:
        folder: The model folder.

    Returns:
        `model.safetensors`, or the shards that its index lists, sorted by name.

    Raises:
        IntegrityError: The folder has no safetensors files, or a shard is missing.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise IntegrityError(
            f"{folder} has no model.safetensors, and other weight files are not read",
            "save the model again with safe_serialization=True",
        )
    stated = read_json(index).get("weight_map")
    if (
        not stated
        or not isinstance(stated, dict)
        or not all(isinstance(n, str) for n in stated.values())
    ):
        raise IntegrityError(
            f"{index}: weight_map does not map tensors to files", "fetch the base again"
        )
    names = sorted(set(stated.values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name) or not (folder / name).is_file():
            raise IntegrityError(f"{folder}: shard {name!r} is missing", "fetch the base again")
    return [folder / name for name in names]


def compute_fingerprint(folder: Path, fresh: bool = False) -> str:
    """Compute the fingerprint of the weights in a model folder.

    It is the sha256 of the sorted rows (name, dtype, shape, sha256 of the bytes) of all tensors, so
    it does not depend on how the tensors are divided among files. It is cached for files of the
    same path, inode, size, and times of modification and change. The last of these cannot be set
    back, so a file that was changed is always read again.

    Args:
        folder: The model folder.
        fresh: Read all bytes again instead of using the cache.

    Returns:
        The fingerprint, `sha256:` and 64 hexadecimal digits.

    Raises:
        IntegrityError: The folder has no safetensors files, or one of them is damaged.
    """
    files = list_weight_files(folder)
    stats = [_describe_file(file) for file in files]
    key = hashlib.sha256(canonical_json(stats)).hexdigest()
    cache = hub_home() / "fingerprints" / f"{key}.json"
    if not fresh and (known := _read_cache(cache, stats)):
        return known
    rows = [[n, d, list(s), h] for n, d, s, h in hash_tensors(files)]
    value = digest_of(sorted(rows))
    write_json(cache, {"files": stats, "fingerprint": value, "check": digest_of([stats, value])})
    return value


def hash_files(files: Sequence[Path]) -> str:
    """Hash large files one after the other; the value is cached as a fingerprint is.

    Args:
        files: The files.

    Returns:
        The sha256 of their joined bytes, 64 hexadecimal digits.
    """
    stats: list[Any] = ["sha256", *(_describe_file(file) for file in files)]
    key = hashlib.sha256(canonical_json(stats)).hexdigest()
    cache = hub_home() / "fingerprints" / f"{key}.json"
    if known := _read_cache(cache, stats):
        return known
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
    value = digest.hexdigest()
    write_json(cache, {"files": stats, "fingerprint": value, "check": digest_of([stats, value])})
    return value


def _describe_file(path: Path) -> list[Any]:
    """Return what changes if another content takes the place of a file's."""
    real = path.resolve()
    stat = real.stat()
    return [str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]


def _read_cache(cache: Path, stats: list[list[Any]]) -> str | None:
    """Return the cached fingerprint of files in this state; None if it is damaged."""
    try:
        record = read_json(cache) if cache.is_file() else {}
    except HubError:
        return None
    value = record.get("fingerprint")
    return value if record.get("check") == digest_of([stats, value]) else None
