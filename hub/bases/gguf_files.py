"""GGUF files on this machine: how a base refers to them, and files that were split."""

from __future__ import annotations

import re
from pathlib import Path

from experthub.hub.bases.ollama import BLOB, find_blob
from experthub.hub.errors import NotFoundError
from experthub.hub.formats.gguf_header import MAGIC
from experthub.hub.registry.expert import Reference

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def find_gguf_files(source: str, near: Path) -> list[Path]:
    """Find the GGUF files that a source refers to.

    Args:
        source: A path, `file:PATH`, or `ollama:NAME`; any other source refers to none.
        near: The folder that a relative path starts from.

    Returns:
        The file, or all parts of a file that was split, in their order; empty for another source.

    Raises:
        NotFoundError: There is no such file, or a part of it is missing.
    """
    if source.startswith("ollama:"):
        return [find_blob(source)]
    if source.startswith("pypi:"):
        return []
    path = Reference.parse(source, near).folder
    if path is None or path.is_dir():
        return []
    if not path.is_file():
        if path.suffix == ".gguf" or BLOB.fullmatch(path.name):
            raise NotFoundError(f"there is no file {path}", "name an existing GGUF file")
        return []
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC and path.suffix != ".gguf":
            return []
    return _list_parts(path)


def _list_parts(path: Path) -> list[Path]:
    """List all parts of a file that was split, whichever of them is named."""
    found = SPLIT.fullmatch(path.name)
    if not found:
        return [path]
    stem, _, count = found.groups()
    parts = [path.with_name(f"{stem}-{i + 1:05}-of-{count}.gguf") for i in range(int(count))]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise NotFoundError(
            f"{path} is one of {len(parts)} parts, and {missing[0]} is missing",
            f"put all parts into {path.parent}",
        )
    return parts


def name_after(files: list[Path]) -> str:
    """Make the beginning of a folder's name for the base that is made from GGUF files.

    Args:
        files: The parts, in their order.

    Returns:
        The name of the file in lower case, without its ending and without the number of the part.
    """
    stem = files[0].name.removesuffix(".gguf")
    found = SPLIT.fullmatch(files[0].name)
    name = re.sub(r"[^a-z0-9._-]+", "-", (found[1] if found else stem).lower()).strip("-.")
    return "ollama" if BLOB.fullmatch(files[0].name) else name[:80] or "gguf"
