"""Downloads over HTTP that continue where they stopped and are verified by sha256."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING

from experthub.hub.errors import IntegrityError
from experthub.hub.files.plain_files import open_plain
from experthub.hub.transfer.remotes._http import open_client, redact_url, request, retry
from experthub.hub.transfer.remotes._limits import (
    Progress,
    check_online,
    check_size,
    ignore_progress,
)

if TYPE_CHECKING:
    import httpx

SHA256 = re.compile(r"[0-9a-f]{64}")


def download(
    url: str,
    sha256: str,
    folder: Path,
    progress: Progress = ignore_progress,
    *,
    headers: dict[str, str] | None = None,
    size: int | None = None,
) -> Path:
    """Download a file to `folder/<sha256>`, and continue an earlier download.

    Requests are repeated a few times if the connection breaks or the server is busy.

    Args:
        url: The URL.
        sha256: The sha256 that the file must have, as 64 hexadecimal digits.
        folder: The folder; it is created if it does not exist.
        progress: A progress callback.
        headers: The headers of the request.
        size: The size that the file must have, in bytes. No more bytes are read. None means any
            size.

    Returns:
        The path of the file.

    Raises:
        HubError: `HUB_OFFLINE` is set, or the server did not deliver the file.
        IntegrityError: The file is larger than the user allows, or has another size or sha256. In
            the last case it is deleted.
    """
    check_online(redact_url(url))
    if not SHA256.fullmatch(sha256):  # It becomes the name of a file.
        raise IntegrityError(
            f"{redact_url(url)} has the invalid digest {sha256[:80]!r}", "use another source"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / sha256
    with _open_locked(partial) as file:
        growing = HashedFile(file)
        try:
            with open_client(headers) as session:
                retry(lambda: _append(session, url, growing, progress, size), lambda: growing.size)
        except BaseException:
            if not file.tell():  # An empty file is no use for a later try.
                partial.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
        found = growing.digest.hexdigest()
        if found != sha256:
            partial.unlink(missing_ok=True)
            raise IntegrityError(
                f"{redact_url(url)} has the sha256 {found[:12]}, expected {sha256[:12]}",
                "try again, or use another source: the file was changed",
            )
    return partial


@contextmanager
def _open_locked(path: Path) -> Iterator[BufferedRandom]:
    """Open and lock a file for appending; open it again if its last owner moved it away."""
    while True:
        with open_plain(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if same:
                yield file
                return


class HashedFile:
    """A growing file together with the sha256 of its bytes.

    Args:
        file: The file, open for reading and appending. The bytes in it are hashed.
    """

    def __init__(self, file: BufferedRandom) -> None:
        self.file = file
        file.seek(0)
        self.digest = hashlib.file_digest(file, "sha256")

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.file.seek(0, os.SEEK_END)

    def write(self, chunk: bytes) -> None:
        """Append bytes to the file.

        Args:
            chunk: The bytes.
        """
        self.file.write(chunk)
        self.digest.update(chunk)

    def clear(self) -> None:
        """Remove all bytes from the file."""
        self.file.truncate(0)
        self.digest = hashlib.sha256()


def _append(
    session: httpx.Client, url: str, growing: HashedFile, progress: Progress, limit: int | None
) -> None:
    """Download the bytes of a file that are still missing."""
    import httpx

    start = growing.size
    if limit is not None and start == limit:
        return
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        with request(session, url, headers) as (answer, chunks):
            if start and answer.status_code != 206:
                growing.clear()
                start = 0
            size = _find_size(answer, start) or limit or 0
            _check_stated_size(url, size, limit)
            check_size(redact_url(url), size)
            for chunk in chunks:
                growing.write(chunk)
                start += len(chunk)
                progress(start, size)
                if limit is not None and start > limit:
                    return
                check_size(redact_url(url), start)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 416:  # 416: no bytes are missing, if the sha256 is right.
            raise


def _find_size(answer: httpx.Response, start: int) -> int:
    """Return the size of the whole file that an answer states; 0 if it states none."""
    whole = re.fullmatch(
        r"bytes [0-9]+-[0-9]+/([0-9]{1,18})", answer.headers.get("Content-Range", "")
    )
    stated = answer.headers.get("Content-Length", "")
    left = int(stated) if re.fullmatch("[0-9]{1,18}", stated) else -start
    return int(whole.group(1)) if whole and answer.status_code == 206 else start + left


def _check_stated_size(url: str, size: int, wanted: int | None) -> None:
    """Refuse a file of a wrong size before its bytes are downloaded."""
    if wanted is not None and size != wanted:
        raise IntegrityError(
            f"{redact_url(url)} has {size} bytes, expected {wanted}",
            "try again, or use another source: the file was changed",
        )


def fetch_small(session: httpx.Client, url: str, size: int) -> bytes:
    """Download a small file of known size into memory.

    The download starts again if the connection breaks or the server is busy.

    Args:
        session: The client.
        url: The URL.
        size: The size of the file in bytes.

    Returns:
        The bytes of the file.

    Raises:
        IntegrityError: The file has another size.
    """

    def fetch() -> bytes:
        content = bytearray()
        with request(session, url) as (answer, chunks):
            _check_stated_size(url, _find_size(answer, 0) or size, size)
            for chunk in chunks:
                content += chunk
                if len(content) > size:
                    break
        return bytes(content)

    content: bytes = retry(fetch, lambda: 0)
    if len(content) != size:
        raise IntegrityError(
            f"{redact_url(url)} has {'more' if len(content) > size else 'fewer'} than {size} bytes",
            "try again: the file was cut or changed during the transfer",
        )
    return content
