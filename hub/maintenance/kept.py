"""Entries, lock files, tasks, fetched folders and banks: what is damaged, and how it is put right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from experthub.hub.errors import HubError
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.atomic import discard, walk_files, write_text
from experthub.hub.files.digests import sha256_of
from experthub.hub.progress import Report
from experthub.hub.recipes.lock_file import Lock
from experthub.hub.registry.layers import entry_files
from experthub.hub.registry.registry_file import RegistryFile
from experthub.hub.store.roots import ROOTS, lock_files, root_files, root_name
from experthub.hub.store.store import Store
from experthub.hub.tasks import bigbench
from experthub.hub.tasks.task_files import import_again
from experthub.hub.transfer.remotes import hf


@dataclass(frozen=True)
class Kept:
    """Something damaged.  name: as it is shown.  wrong: files of a folder.  mend: put it right, or
    raise HubError.
    """

    path: Path
    name: str
    mend: Callable[[], object]
    wrong: list[str] = field(default_factory=list)


def texts(root: Path) -> Iterator[Kept]:
    """The damaged ones of the user's own entries, of lock files, and of what says where these are.

    What is mended while this goes on is used.
    """
    for path in root_files(root):
        content = path.read_bytes()
        if root_name(content) != path.name:
            right = partial(_is_root, path.name)
            mend = partial(_mend, path, content, right, "it is damaged")
            yield Kept(path, f"{ROOTS}/{path.name}", mend)
    for path in lock_files(root):
        if problem := _problem(path, _read_lock):
            yield Kept(path, str(path), problem)
    for path in entry_files(root / "registry"):
        if problem := _problem(path, _read_entry):
            yield Kept(path, str(path.relative_to(root)), problem)


def _is_root(name: str, content: bytes) -> bool:
    return root_name(content) == name


def _problem(path: Path, read: Callable[[Path], None]) -> Callable[[], object] | None:
    """What mends a text that is not as it was sealed, or cannot be read; None for a good one."""
    try:
        content = path.read_bytes()
        read(path)
    except FileNotFoundError:  # removed at this moment
        return None
    except HubError as error:
        why = error.message
    else:
        if checksummed_text.is_whole(content):
            return None
        why = "it is not as the hub wrote it; if you edited it, remove its last line"
    return partial(_mend, path, content, checksummed_text.is_sealed, why)


def _mend(path: Path, content: bytes, right: Callable[[bytes], bool], why: str) -> None:
    whole = checksummed_text.repair_bit(content, right)
    if whole is None:
        raise HubError(why, "mend it, or remove it and make it again")
    write_text(path, whole.decode())


def _read_lock(path: Path) -> None:

    Lock.read(path)


def _read_entry(path: Path) -> None:
    """Read an entry; HubError when it cannot be, or is another's."""
    content = yaml_files.validate(RegistryFile, yaml_files.read(path))
    if [(e.name, f"{e.version}.yaml") for e in content.experts] != [(path.parent.name, path.name)]:
        raise HubError("it is in the wrong place")


def folders(root: Path, report: Report) -> Iterator[Kept]:
    """The damaged ones of the tasks, of the folders that were fetched from model hubs, and of the banks."""
    manifests = [p for p in walk_files(root / "tasks") if p.name == checksummed_text.MANIFEST]
    for folder in [manifest.parent for manifest in manifests]:
        reference = ":".join(str(folder.relative_to(root / "tasks")).split("/", 1))
        if wrong := damaged_in(folder):
            yield Kept(folder, f"tasks/{reference}", partial(_task_again, reference, folder), wrong)
    for manifest in sorted((root / "hf").glob(f"*/*/{checksummed_text.MANIFEST}")):
        folder = manifest.parent
        if hf.FOLDER.fullmatch(folder.name):
            name = str(folder.relative_to(root))
            report(f"hashing {name}", 0, 0)
            if wrong := damaged_in(folder):
                yield Kept(folder, name, partial(hf.fetch_again, folder), wrong)
    for ref in sorted((root / "hf").glob("*/refs/*")):
        commit = ref.read_text(errors="replace").removesuffix("\n")
        known = {folder.name[:40] for folder in ref.parent.parent.iterdir()}
        if not ref.name.startswith(".") and commit not in known:
            yield Kept(ref, str(ref.relative_to(root)), ref.unlink, [ref.name])
    for manifest in sorted((root / "banks").glob(f"*/[!.]*/{checksummed_text.MANIFEST}")):
        folder, name = manifest.parent, str(manifest.parent.relative_to(root))
        report(f"hashing {name}", 0, 0)
        if wrong := damaged_in(folder):  # the next composition makes it again
            yield Kept(folder, name, partial(discard, folder), wrong)


def damaged_in(folder: Path) -> list[str]:
    """The files of a folder that are not as its manifest says; the manifest itself, if it is damaged."""
    record = checksummed_text.read_manifest(folder)
    if record is None:
        return [checksummed_text.MANIFEST]
    wrong = [
        name
        for name, sha256 in record["files"].items()
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256
    ]
    own = checksummed_text.is_sealed((folder / checksummed_text.MANIFEST).read_bytes())
    return wrong if own else [*wrong, checksummed_text.MANIFEST]


def _task_again(reference: str, folder: Path) -> None:
    """Import a task again from where it came."""
    record = checksummed_text.read_manifest(folder)
    if source := (record or {}).get("source"):
        import_again(reference, Path(source))
    elif reference.startswith("bigbench:"):
        bigbench.import_again(reference.partition(":")[2], Store())
    else:
        raise HubError("nothing says where it came from")
