"""Objects: immutable files that are named after their sha256."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from experthub.hub.errors import IntegrityError
from experthub.hub.files.atomic import hub_home, open_atomically, sync_folder
from experthub.hub.files.digests import CHUNK, sha256_of

TRASH = "trash"


@dataclass(frozen=True)
class ObjectStore:
    """Objects by sha256 below a root folder. An object under its name is complete.

    Any number of processes may use one root folder at the same time.

    Args:
        root: The root folder. The default is `$HUB_HOME`.
    """

    root: Path = field(default_factory=hub_home)

    def path(self, sha256: str) -> Path:
        """Return the path of an object, whether it is stored or not.

        Args:
            sha256: The sha256 of the object as 64 hexadecimal digits.

        Returns:
            The path.
        """
        return Path(self._format_path(sha256))

    def _format_path(self, sha256: str) -> str:
        """Return the path of an object as text.

        This takes a tenth of the time of `path`. An expert has four objects, and a recipe may have
        thousands of experts.
        """
        return f"{self.root}/objects/sha256/{sha256[:2]}/{sha256[2:]}"

    def __contains__(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def list_objects(self) -> dict[str, Path]:
        """List all objects.

        Returns:
            The path of each object by sha256, sorted.
        """
        found = (self.root / "objects" / "sha256").glob("[0-9a-f][0-9a-f]/*")
        return {parse_sha256(p): p for p in sorted(found) if re.fullmatch("[0-9a-f]{62}", p.name)}

    def put(self, source: Path, sha256: str, renew: bool = False, link: bool = False) -> Path:
        """Copy a file into the store. An object that is stored already is not copied again.

        Args:
            source: The file.
            sha256: The sha256 of the file as 64 hexadecimal digits.
            renew: Replace the stored object, because it is damaged.
            link: Create a hard link instead of a copy if the file system supports it. The file must
                belong to the hub, and its sha256 must have been verified.

        Returns:
            The path of the object.

        Raises:
            IntegrityError: The file has another sha256.
        """
        target = self.path(sha256)
        if not renew and (self._restore(target) or (link and _link(source, target))):
            return target
        with source.open("rb") as data, open_atomically(target, 0o444) as file:
            digest = hashlib.sha256()
            while chunk := data.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != sha256:
                raise IntegrityError(
                    f"{source} is damaged: it has the sha256 {digest.hexdigest()[:12]}, "
                    f"expected {sha256[:12]}",
                    "get the file again from its source",
                )
        return target

    def link_to(self, sha256: str, target: Path) -> bool:
        """Create a hard link to an object in a folder of the hub.

        Args:
            sha256: The sha256 of the object as 64 hexadecimal digits.
            target: The path of the link.

        Returns:
            Whether the object is stored and the file system supports links.
        """
        try:
            if self._restore(self.path(sha256)):
                os.link(self.path(sha256), target)
                return True
        except OSError:
            pass
        return False

    def _restore(self, path: Path) -> bool:
        """Tell whether an object is stored; move it back first if it is in the trash."""
        if path.is_file():
            return True
        try:
            (self.root / TRASH / parse_sha256(path)).rename(path)
        except OSError:
            return False
        return True

    def _measure(self, sha256: str) -> int | None:
        """Return the size of an object in bytes, or None if it is not stored."""
        with suppress(FileNotFoundError):
            return os.stat(self._format_path(sha256)).st_size  # noqa: PTH116
        with suppress(FileNotFoundError):  # Another process moved it to the trash.
            path = self.path(sha256)
            return path.stat().st_size if self._restore(path) else None
        return None

    def verify_object(self, sha256: str) -> Path:
        """Hash an object, and return its path.

        Args:
            sha256: The sha256 of the object as 64 hexadecimal digits.

        Returns:
            The path of the object.

        Raises:
            IntegrityError: The object is damaged.
        """
        path = self.path(sha256)
        if sha256_of(path) != sha256:
            raise explain_damage(path)
        return path


def parse_sha256(path: Path) -> str:
    """Parse the sha256 of an object from its path.

    Args:
        path: The path of an object.

    Returns:
        The sha256 as 64 hexadecimal digits.
    """
    return path.parent.name + path.name


def explain_damage(path: Path) -> IntegrityError:
    """Return the error for a damaged object.

    Args:
        path: The path of the object.

    Returns:
        The error.
    """
    return IntegrityError(
        f"object {parse_sha256(path)[:12]} in the store is damaged",
        "run hub verify --repair",
    )


def _link(source: Path, target: Path) -> bool:
    """Create a hard link to a file that is on the disk, if the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.chmod(source.stat().st_mode & 0o444)  # The umask may have removed more.
        os.utime(source)  # A collection keeps what was used recently.
        os.link(source, target)
    except FileExistsError:
        return True
    except OSError:
        return False
    sync_folder(target.parent)
    return True
