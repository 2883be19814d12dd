"""Copying an expert's folder into the store before it is checked.

The files of somebody else can change at any moment: between a check and the use of what was checked,
a link may lead elsewhere, and a mapped file may be cut. So each file is opened once and copied. The
copy is checked, and the objects of the store are links to the copy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from experthub.hub.errors import HubError, IntegrityError, NotFoundError
from experthub.hub.files.atomic import open_atomically, open_draft_folder
from experthub.hub.files.digests import read_chunks
from experthub.hub.files.patterns import matches_any
from experthub.hub.files.plain_files import open_plain
from experthub.hub.formats.adapter import GATES
from experthub.hub.kinds import kinds
from experthub.hub.registry.expert import DESCRIPTION
from experthub.hub.store.leases import RECEIVED
from experthub.hub.store.objects import ObjectStore


@contextmanager
def copy_folder(
    folder: Path, objects: ObjectStore, renew: Set[str] = frozenset()
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Copy the files of an expert's folder into a draft folder of the store.

    A file whose content is stored already is not copied: the draft has a link to the object.

    Args:
        folder: The folder of somebody else.
        objects: The store.
        renew: The sha256 of damaged objects, which are not used.

    Yields:
        The draft, and the sha256 of its files by name. Errors of the block name `folder` instead.

    Raises:
        NotFoundError: There is no such folder.
        IntegrityError: The folder holds no expert of a known kind, or a name in it is not a file.
    """
    if not folder.is_dir():
        hint = "name the folder that holds the adapter"
        if "#" in folder.name:
            hint = "write file:PLACE#name@version for one expert of a shared folder or archive"
        raise NotFoundError(f"there is no folder {folder}", hint)
    kind = kinds.recognise(folder)
    patterns = (*kind.files, *kind.companions, GATES, DESCRIPTION)
    names = sorted(path.name for path in folder.iterdir() if matches_any(path.name, patterns))
    with open_draft_folder(objects.root / RECEIVED) as draft:
        hashed: dict[str, str] = {}
        linked: list[str] = []
        try:
            for name in names:
                with suppress(FileNotFoundError):  # A link that leads nowhere.
                    hashed[name] = _copy_file(folder / name, draft / name, objects, renew, linked)
            yield draft, hashed
        except HubError as error:
            for sha256 in linked if isinstance(error, IntegrityError) else ():
                objects.verify_object(sha256)  # If it is damaged, the folder may be intact.
            error.message = error.message.replace(str(draft), str(folder))
            raise


def _copy_file(
    source: Path, target: Path, objects: ObjectStore, renew: Set[str], linked: list[str]
) -> str:
    """Copy or link a file into a draft; add its sha256 to `linked` if it was linked; return it."""
    with open_plain(source, follow=True) as file:
        size = os.fstat(file.fileno()).st_size  # A file that grows would be read without an end.
        known = hashlib.sha256()
        for chunk in read_chunks(file, 0, size):
            known.update(chunk)
        if known.hexdigest() not in renew and objects.link_to(known.hexdigest(), target):
            linked.append(known.hexdigest())
            return linked[-1]
        digest = hashlib.sha256()
        with open_atomically(target, 0o444) as copy:
            for chunk in read_chunks(file, 0, size):
                digest.update(chunk)
                copy.write(chunk)
        return digest.hexdigest()
