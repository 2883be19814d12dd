"""Damaged registry entries, lock files, tasks, fetched folders and banks, and their repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from experthub.hub.errors import HubError
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.atomic import discard, walk_files, write_text
from experthub.hub.progress import Report
from experthub.hub.recipes.lock_file import Lock
from experthub.hub.registry.layers import BASE_ENTRY, list_entry_files
from experthub.hub.registry.registry_file import RegistryFile
from experthub.hub.store.roots import ROOTS, list_lock_files, list_root_files, name_root
from experthub.hub.store.store import Store
from experthub.hub.tasks import bigbench
from experthub.hub.tasks.task_files import reimport_from_folder
from experthub.hub.transfer.remotes import hf


@dataclass(frozen=True)
class DamagedItem:
    """A damaged file or folder.

    Args:
        path: The path of the file or folder.
        name: The name that is shown to the user.
        repair: A function without arguments that repairs it, or raises HubError.
        wrong: The names of the damaged files, for a folder.
    """

    path: Path
    name: str
    repair: Callable[[], object]
    wrong: list[str] = field(default_factory=list)


def find_damaged_texts(root: Path) -> Iterator[DamagedItem]:
    """Find the damaged registry entries, lock files, and files that remember lock files.

    A file that is repaired during the iteration is used for the rest of it.

    Args:
        root: The root folder of the store.

    Yields:
        The damaged files.
    """
    for path in list_root_files(root):
        content = path.read_bytes()
        if name_root(content) != path.name:
            is_right = partial(_has_root_name, path.name)
            repair = partial(_repair_text, path, content, is_right, "it is damaged")
            yield DamagedItem(path, f"{ROOTS}/{path.name}", repair)
    for path in list_lock_files(root):
        if found := _find_repair(path, _read_lock):
            yield DamagedItem(path, str(path), found)
    for path in list_entry_files(root / "registry"):
        if found := _find_repair(path, _read_entry):
            yield DamagedItem(path, str(path.relative_to(root)), found)


def _has_root_name(name: str, content: bytes) -> bool:
    """Tell whether a file that remembers a lock file has the name that follows from its content."""
    return name_root(content) == name


def _find_repair(path: Path, read: Callable[[Path], None]) -> Callable[[], object] | None:
    """Return a repair function for a text file that is damaged, or None for an intact file."""
    try:
        content = path.read_bytes()
        read(path)
    except FileNotFoundError:  # Another process removed it.
        return None
    except HubError as error:
        why = error.message
    else:
        if checksummed_text.is_whole(content):
            return None
        why = "its checksum does not match; if you edited it, remove its last line"
    return partial(_repair_text, path, content, checksummed_text.is_sealed, why)


def _repair_text(path: Path, content: bytes, is_right: Callable[[bytes], bool], why: str) -> None:
    """Repair a text file in which one bit was flipped; raise an error with the reason if that fails."""
    whole = checksummed_text.repair_bit(content, is_right)
    if whole is None:
        raise HubError(why, "correct the file, or remove it and create it again")
    write_text(path, whole.decode())


def _read_lock(path: Path) -> None:
    """Read a lock file; raise HubError if it cannot be read."""
    Lock.read(path)


def _read_entry(path: Path) -> None:
    """Read a registry entry; raise HubError if it cannot be read or has the name of another one."""
    content = yaml_files.validate(RegistryFile, yaml_files.read(path))
    found = [(e.name, f"{e.version}.yaml") for e in content.experts]
    found += [(name, BASE_ENTRY) for name in content.bases]
    if found != [(path.parent.name, path.name)]:
        raise HubError("its name and version differ from its path")


def find_damaged_folders(root: Path, report: Report) -> Iterator[DamagedItem]:
    """Find the damaged folders: tasks, folders that were fetched from a model hub, and banks.

    Args:
        root: The root folder of the store.
        report: A progress callback.

    Yields:
        The damaged folders, and the damaged files that remember the commit of a branch or tag.
    """
    yield from _find_damaged_tasks(root)
    for folder in _find_manifests(root, "hf/*/*"):
        if hf.FOLDER.fullmatch(folder.name):
            yield from _check_folder(root, folder, partial(hf.fetch_again, folder), report)
    for ref in sorted((root / "hf").glob("*/refs/*")):
        commit = ref.read_text(errors="replace").removesuffix("\n")
        known = {folder.name[:40] for folder in ref.parent.parent.iterdir()}
        if not ref.name.startswith(".") and commit not in known:
            yield DamagedItem(ref, str(ref.relative_to(root)), ref.unlink, [ref.name])
    for folder in _find_manifests(root, "banks/*/[!.]*"):
        # The next composition builds the bank again.
        yield from _check_folder(root, folder, partial(discard, folder), report)


def _find_manifests(root: Path, pattern: str) -> list[Path]:
    """List the folders that match a shell pattern and have a manifest."""
    return [path.parent for path in sorted(root.glob(f"{pattern}/{checksummed_text.MANIFEST}"))]


def _check_folder(
    root: Path, folder: Path, repair: Callable[[], object], report: Report
) -> Iterator[DamagedItem]:
    """Yield a folder if it is damaged."""
    name = str(folder.relative_to(root))
    report(f"hashing {name}", 0, 0)
    if wrong := find_damaged_files(folder):
        yield DamagedItem(folder, name, repair, wrong)


def _find_damaged_tasks(root: Path) -> Iterator[DamagedItem]:
    """Find the damaged tasks."""
    manifests = [p for p in walk_files(root / "tasks") if p.name == checksummed_text.MANIFEST]
    for folder in [manifest.parent for manifest in manifests]:
        reference = ":".join(str(folder.relative_to(root / "tasks")).split("/", 1))
        if wrong := find_damaged_files(folder):
            repair = partial(_reimport_task, reference, folder)
            yield DamagedItem(folder, f"tasks/{reference}", repair, wrong)


def find_damaged_files(folder: Path) -> list[str]:
    """Find the files of a folder that are missing or differ from its manifest.

    Args:
        folder: A folder with a manifest.

    Returns:
        The names of the files; with the name of the manifest if the manifest is damaged.
    """
    record = checksummed_text.read_manifest(folder)
    if record is None:
        return [checksummed_text.MANIFEST]
    wrong = checksummed_text.find_changed_files(folder, record["files"])
    own = checksummed_text.is_sealed((folder / checksummed_text.MANIFEST).read_bytes())
    return wrong if own else [*wrong, checksummed_text.MANIFEST]


def _reimport_task(reference: str, folder: Path) -> None:
    """Import a task again from its source."""
    record = checksummed_text.read_manifest(folder)
    if source := (record or {}).get("source"):
        reimport_from_folder(reference, Path(source))
    elif reference.startswith("bigbench:"):
        bigbench.reimport_from_archive(reference.partition(":")[2], Store())
    else:
        raise HubError("its source is not known; remove the folder, and import the task again")
