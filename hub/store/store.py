"""The content-addressed store: an object under its digest is complete, and never changes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from types import MappingProxyType

from experthub.hub.errors import IntegrityError, NotFoundError
from experthub.hub.files.atomic import hub_home, open_atomically, sync_folder
from experthub.hub.files.digests import canonical_json, sha256_of
from experthub.hub.files.json_files import read_json
from experthub.hub.registry.expert import (
    Identity,
)
from experthub.hub.store.folder import read_folder
from experthub.hub.store.leases import lease
from pydantic import ValidationError

MAX_SMALL = 8 << 20  # bytes of a JSON file
CHUNK = 1 << 20
TRASH = "trash"


@dataclass(frozen=True)
class Store:
    """Objects by sha256 under a root folder; any number of processes may use one at a time.

    root: the folder; `$HUB_HOME` by default.
    """

    root: Path = field(default_factory=hub_home)

    def path(self, sha256: str) -> Path:
        """Where the object with these 64 hex digits is, or would be."""
        return Path(self._place(sha256))

    def _place(self, sha256: str) -> str:
        """The same as text, which takes a tenth of the time: an expert has four, and a recipe thousands."""
        return f"{self.root}/objects/sha256/{sha256[:2]}/{sha256[2:]}"

    def __contains__(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def objects(self) -> dict[str, Path]:
        """Every object here, by sha256."""
        found = (self.root / "objects" / "sha256").glob("[0-9a-f][0-9a-f]/*")
        return {_sha256(p): p for p in sorted(found) if re.fullmatch("[0-9a-f]{62}", p.name)}

    def put(self, source: Path, sha256: str, renew: bool = False, link: bool = False) -> Path:
        """Copy a file in under its digest; IntegrityError when its content is another.

        renew: in the place of a damaged one.  link: it is the hub's own, and was compared with the
        digest: another name for it will do.
        """
        target = self.path(sha256)
        if not renew and (self._here(target) or (link and _linked(source, target))):
            return target
        with source.open("rb") as data, open_atomically(target, 0o444) as file:
            digest = hashlib.sha256()
            while chunk := data.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != sha256:
                raise IntegrityError(
                    f"{source} is damaged: sha256 {digest.hexdigest()[:12]}, expected {sha256[:12]}",
                    "get it again from its source",
                )
        return target

    def _here(self, path: Path) -> bool:
        """Whether an object is here; one that waits to be deleted comes back."""
        if path.is_file():
            return True
        try:
            (self.root / TRASH / _sha256(path)).rename(path)
        except OSError:
            return False
        return True

    def identity(self, digest: str) -> Identity:
        """The files of an expert, by its digest; NotFoundError when it is not here whole."""
        identity = self.manifest(digest)
        if identity is None:
            raise NotFoundError(f"expert {digest[:19]} is not in the store", "run hub pull first")
        for name, info in identity.files.items():
            size = self._size(info.sha256)
            if size is None:
                raise NotFoundError(
                    f"{name} of expert {digest[:19]} is missing from the store",
                    "run hub pull again",
                )
            if size != info.size:
                raise _damaged(self.path(info.sha256))
        return identity

    def _size(self, sha256: str) -> int | None:
        """Bytes of an object; None when it is not here."""
        with suppress(FileNotFoundError):
            return os.stat(self._place(sha256)).st_size  # noqa: PTH116
        with suppress(FileNotFoundError):  # collected at this moment
            path = self.path(sha256)
            return path.stat().st_size if self._here(path) else None
        return None

    def locate(self, digest: str, name: str) -> Path:
        """Where one file of an expert is; its size is checked, its bytes are not: for headers."""
        info = self.identity(digest).files.get(name)
        if info is None:
            raise IntegrityError(f"expert {digest[:19]} has no {name}", "pull or add it again")
        return self.path(info.sha256)

    def file(self, digest: str, name: str) -> Path:
        """One file of an expert, its bytes checked against its digest."""
        return self.checked(_sha256(self.locate(digest, name)))

    def checked(self, sha256: str) -> Path:
        """Where an object is, its bytes checked against its digest."""
        path = self.path(sha256)
        if sha256_of(path) != sha256:
            raise _damaged(path)
        return path

    def read(self, digest: str, name: str) -> mmap:
        """The bytes of one file of an expert, checked and mapped into memory."""
        path = self.locate(digest, name)
        with path.open("rb") as file:
            data = mmap(file.fileno(), 0, access=ACCESS_COPY)
        if hashlib.sha256(data).hexdigest() != _sha256(path):
            raise _damaged(path)
        return data

    def add(
        self,
        folder: Path,
        expected: str | None = None,
        renew: Set[str] = frozenset(),
        hashed: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[str, Identity]:
        """Take an expert's folder in: checked, copied, verified; nothing stays when it is refused.

        expected: the digest it must have.  renew: sha256 of objects that are replaced though they
        are here, because they are damaged.  hashed: the sha256 of files in a folder of the hub's
        own, of which every byte was read just now.  Returns its digest and identity.
        """
        identity = read_folder(folder, hashed)
        if expected and identity.digest != expected:
            raise IntegrityError(
                f"{folder} is {identity.digest[:19]}, expected {expected[:19]}",
                "the source has changed: add it as a new version, or get the original",
            )
        self.take(folder, identity, renew, hashed)
        return identity.digest, identity

    def take(
        self,
        folder: Path,
        identity: Identity,
        renew: Set[str] = frozenset(),
        hashed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Take the files of a folder in, which `read_folder` found to be this identity's: see `add`."""
        self.hold(identity.digest, identity=identity)
        for name, info in identity.files.items():
            self.put(folder / name, info.sha256, info.sha256 in renew, link=name in hashed)
        path = self.path(identity.digest.removeprefix("sha256:"))
        if _sha256(path) in renew or not self._here(path):
            with open_atomically(path, 0o444) as file:
                file.write(canonical_json(identity.record()))

    def hold(self, *digests: str, identity: Identity | None = None) -> None:
        """Keep experts from being collected for as long as this process runs.

        identity: of one that is not here yet.
        """
        with lease(self.root) as mine:
            for digest in digests:
                found = identity or self.manifest(digest)
                files = found.files.values() if found else ()
                mine.add({digest.removeprefix("sha256:"), *(file.sha256 for file in files)})

    def manifest(self, digest: str) -> Identity | None:
        """What an expert consists of, whether its files are here or not; None when it is not here."""
        sha256 = digest.removeprefix("sha256:")
        try:
            if self._size(sha256) is None:
                return None
            stat = os.stat(self._place(sha256))  # noqa: PTH116
            return _read_identity(self._place(sha256), digest, stat.st_size, stat.st_mtime_ns)
        except FileNotFoundError:  # collected at this moment
            return None

    def copy_out(self, digest: str, folder: Path) -> None:
        """Write an expert's files, as stored, into a folder; never links, which could be written through."""
        for name in self.identity(digest).files:
            with open_atomically(folder / name) as target:
                target.write(self.read(digest, name))


@lru_cache(maxsize=1 << 16)
def _read_identity(place: str, digest: str, size: int, mtime: int) -> Identity:
    """An identity from its object; size and mtime make a changed file another one."""
    path = Path(place)
    if size > MAX_SMALL or "sha256:" + sha256_of(path) != digest:
        raise _damaged(path)
    try:
        return Identity.model_validate(read_json(path))
    except ValidationError:
        raise IntegrityError(
            f"object {path.name[:12]} in the store is no expert", "correct the digest"
        ) from None


def _sha256(path: Path) -> str:
    """The digest that an object's place states."""
    return path.parent.name + path.name


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(
        f"object {path.name[:12]} in the store is damaged",
        "run hub verify --repair",
    )


def _linked(source: Path, target: Path) -> bool:
    """Give a file that is on the disk another name, if the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.chmod(0o444)
        os.utime(source)  # it is used now
        os.link(source, target)
    except FileExistsError:
        return True
    except OSError:
        return False
    sync_folder(target.parent)
    return True
