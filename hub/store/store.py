"""The store of experts: their files as objects, and the records that list the files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from types import MappingProxyType

from experthub.hub.errors import IntegrityError, NotFoundError
from experthub.hub.files.atomic import open_atomically
from experthub.hub.files.digests import canonical_json, sha256_of
from experthub.hub.files.json_files import read_json
from experthub.hub.registry.expert import Identity
from experthub.hub.store.folder import read_folder
from experthub.hub.store.leases import hold_lease
from experthub.hub.store.objects import ObjectStore, explain_damage, parse_sha256
from experthub.hub.store.received import copy_folder
from pydantic import ValidationError

MAX_RECORD = 8 << 20  # bytes


@dataclass(frozen=True)
class Store(ObjectStore):
    """Experts by digest below a root folder.

    The files of an expert are objects, and so is the record that lists them, whose sha256 is the
    expert's digest. Any number of processes may use one root folder at the same time.

    Args:
        root: The root folder. The default is `$HUB_HOME`.

    Example:
        >>> from experthub.hub import Store
        >>> "0" * 64 in Store()
        False
    """

    def read_identity(self, digest: str) -> Identity:
        """Read the identity of an expert whose files are all stored.

        Args:
            digest: The digest of the expert.

        Returns:
            The identity, which lists the files.

        Raises:
            NotFoundError: The expert or one of its files is not in the store.
            IntegrityError: The record is damaged, or a file has another size.
        """
        identity = self.find_identity(digest)
        if identity is None:
            raise NotFoundError(f"expert {digest[:19]} is not in the store", "run hub pull first")
        for name, info in identity.files.items():
            size = self._measure(info.sha256)
            if size is None:
                raise NotFoundError(
                    f"{name} of expert {digest[:19]} is missing from the store",
                    "run hub pull again",
                )
            if size != info.size:
                raise explain_damage(self.path(info.sha256))
        return identity

    def find_identity(self, digest: str) -> Identity | None:
        """Read the identity of an expert, even if its files are missing.

        Args:
            digest: The digest of the expert.

        Returns:
            The identity, or None if it is not in the store.

        Raises:
            IntegrityError: The record is damaged, or the object is not an expert.
        """
        sha256 = digest.removeprefix("sha256:")
        try:
            if self._measure(sha256) is None:
                return None
            path = self._format_path(sha256)
            stat = os.stat(path)  # noqa: PTH116
            return _read_record(path, digest, stat.st_size, stat.st_mtime_ns)
        except FileNotFoundError:  # Another process moved it to the trash.
            return None

    def locate(self, digest: str, name: str) -> Path:
        """Return the path of a file of an expert without verifying its bytes, to read its header.

        Args:
            digest: The digest of the expert.
            name: The name of the file.

        Returns:
            The path. The size of the file was checked.

        Raises:
            NotFoundError: The expert or one of its files is not in the store.
            IntegrityError: The expert has no such file, or a file has another size.
        """
        info = self.read_identity(digest).files.get(name)
        if info is None:
            raise IntegrityError(
                f"expert {digest[:19]} has no {name}", "pull the expert or add it again"
            )
        return self.path(info.sha256)

    def verify_file(self, digest: str, name: str) -> Path:
        """Hash a file of an expert, and return its path.

        Args:
            digest: The digest of the expert.
            name: The name of the file.

        Returns:
            The path.

        Raises:
            NotFoundError: The expert or one of its files is not in the store.
            IntegrityError: The expert has no such file, or the file is damaged.
        """
        return self.verify_object(parse_sha256(self.locate(digest, name)))

    def read(self, digest: str, name: str) -> mmap:
        """Map a file of an expert into memory, and hash it.

        Args:
            digest: The digest of the expert.
            name: The name of the file.

        Returns:
            The bytes of the file. Writing to them does not change the file.

        Raises:
            NotFoundError: The expert or one of its files is not in the store.
            IntegrityError: The expert has no such file, or the file is damaged.
        """
        path = self.locate(digest, name)
        with path.open("rb") as file:
            data = mmap(file.fileno(), 0, access=ACCESS_COPY)
        if hashlib.sha256(data).hexdigest() != parse_sha256(path):
            raise explain_damage(path)
        return data

    def add(
        self,
        folder: Path,
        expected: str | None = None,
        renew: Set[str] = frozenset(),
        hashed: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[str, Identity]:
        """Copy an expert's folder into the store; the copy is checked before it gets its place.

        Args:
            folder: The folder.
            expected: The digest that the expert must have. The default accepts any digest.
            renew: The sha256 of damaged objects, which are replaced.
            hashed: The sha256 of files by name. Pass it only for files of the hub itself that were
                hashed just now: they are not hashed again, and may be linked instead of copied.

        Returns:
            The digest and the identity of the expert.

        Raises:
            NotFoundError: There is no such folder.
            IntegrityError: The folder holds no valid expert, or an expert with another digest.
        """
        with self.receive(folder, renew, hashed) as (draft, own):
            identity = read_folder(draft, own)
            if expected and identity.digest != expected:
                raise IntegrityError(
                    f"{folder} is {identity.digest[:19]}, expected {expected[:19]}",
                    "add the changed content as a new version, or get the original content",
                )
            self.take(draft, identity, renew, own)
        return identity.digest, identity

    @contextmanager
    def receive(
        self,
        folder: Path,
        renew: Set[str] = frozenset(),
        hashed: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[tuple[Path, Mapping[str, str]]]:
        """Make a folder that nobody else can change out of an expert's folder, to check and take it.

        Args:
            folder: The folder.
            renew: The sha256 of damaged objects, which are replaced.
            hashed: The sha256 of files by name, as for `add`. The folder is then used as it is.

        Yields:
            The folder to read, and the sha256 of its files by name.

        Raises:
            NotFoundError: There is no such folder.
            IntegrityError: The folder holds no expert of a known kind.
        """
        if hashed:
            yield folder, hashed
        else:
            with copy_folder(folder, self, renew) as found:
                yield found

    def take(
        self,
        folder: Path,
        identity: Identity,
        renew: Set[str] = frozenset(),
        hashed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Take the files of a folder into the store after `read_folder` has checked them.

        Args:
            folder: A folder that `receive` yielded.
            identity: The identity that `read_folder` returned.
            renew: The sha256 of damaged objects, which are replaced.
            hashed: The sha256 of files by name, as for `add`.

        Raises:
            IntegrityError: A file changed after `read_folder` had read it.
        """
        self.hold(identity.digest, identity=identity)
        for name, info in identity.files.items():
            self.put(folder / name, info.sha256, info.sha256 in renew, link=name in hashed)
        path = self.path(identity.digest.removeprefix("sha256:"))
        if parse_sha256(path) in renew or not self._restore(path):
            with open_atomically(path, 0o444) as file:
                file.write(canonical_json(identity.record()))

    def hold(self, *digests: str, identity: Identity | None = None) -> None:
        """Protect experts from collection for as long as this process runs.

        Args:
            *digests: The digests of the experts.
            identity: The identity of an expert that is not stored yet.
        """
        with hold_lease(self.root) as own:
            for digest in digests:
                found = identity or self.find_identity(digest)
                files = found.files.values() if found else ()
                own.add({digest.removeprefix("sha256:"), *(file.sha256 for file in files)})

    def copy_out(self, digest: str, folder: Path) -> None:
        """Copy an expert's files to a folder. They are never linked: a link could be written to.

        Args:
            digest: The digest of the expert.
            folder: The folder.

        Raises:
            NotFoundError: The expert or one of its files is not in the store.
            IntegrityError: A file is damaged.
        """
        for name in self.read_identity(digest).files:
            with open_atomically(folder / name) as target:
                target.write(self.read(digest, name))


@lru_cache(maxsize=1 << 16)
def _read_record(place: str, digest: str, size: int, mtime: int) -> Identity:
    """Read an identity from its object. A file of another size or time is read again."""
    path = Path(place)
    if size > MAX_RECORD or "sha256:" + sha256_of(path) != digest:
        raise explain_damage(path)
    try:
        return Identity.model_validate(read_json(path))
    except ValidationError as error:
        what = f"object {parse_sha256(path)[:12]} in the store"
        for problem in error.errors():
            if problem["type"] == "unknown_kind":
                raise IntegrityError(f"{what}: {problem['msg']}", "install that package") from None
        raise IntegrityError(f"{what} is not an expert", "correct the digest") from None
