"""Tasks on disk: card.yaml and examples.jsonl in one folder for each task."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from experthub.hub.errors import ConflictError, HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.atomic import create_folder, hub_home, walk_files, write_text
from experthub.hub.files.digests import encode_json, sha256_of
from experthub.hub.files.ownership import find_danger
from experthub.hub.files.safe_text import WORD, is_reference
from experthub.hub.files.spelling import find_similar
from experthub.hub.tasks.task import Card, Example, Task
from pydantic import ValidationError

CARD, EXAMPLES = "card.yaml", "examples.jsonl"


def tasks_folder() -> Path:
    """Return the folder of the imported tasks.

    Returns:
        `$HUB_HOME/tasks`, whether it exists or not.
    """
    return hub_home() / "tasks"


def _locate_task(suite: str, name: str) -> Path:
    """Return the folder of an imported task; reject names that a path or a shell would interpret."""
    if not re.fullmatch(rf"{WORD}:{WORD}(/{WORD})*", f"{suite}:{name}"):
        raise UsageError(
            f"{suite + ':' + name!r} is not a task",
            "write suite:name with letters, digits, '.', '_' and '-', or name a folder",
        )
    return tasks_folder() / suite / name


def read_task(reference: str) -> Task:
    """Read a task by its reference.

    Args:
        reference: `suite:name` of an imported task, or a folder.

    Returns:
        The task with its examples.

    Raises:
        NotFoundError: There is no such task; the hint suggests a similar name.
        UsageError: A folder that is named without `./` may be another user's.
        IntegrityError: The task's files are damaged.
        HubError: The task has no examples.
    """
    suite, colon, name = reference.partition(":")
    if colon and not reference.startswith(("/", ".")):
        folder = _locate_task(suite, name)
        if not (folder / CARD).is_file():
            known = [n for s, _, n in (r.partition(":") for r in list_references()) if s == suite]
            similar = find_similar(name, known)
            hint = f"did you mean '{suite}:{similar}'?" if similar else "run hub tasks list"
            if suite == "bigbench":
                hint = f"run hub tasks import {suite} {name}" + (f", or {hint}" if similar else "")
            raise NotFoundError(f"there is no task {reference} here", hint)
        return read_task_folder(folder, reference)
    if not (Path(reference) / CARD).is_file():
        named = [known for known in list_references() if known.endswith(f":{reference}")]
        hint = f"did you mean {named[0]!r}?" if named else f"name a folder that contains a {CARD}"
        raise NotFoundError(f"there is no task {reference}", hint)
    if not reference.startswith(("/", ".")) and (danger := find_danger(Path(reference) / CARD)):
        raise UsageError(
            f"the task {reference} is not read, because {danger}",
            f"write ./{reference} if you trust it",
        )
    return read_task_folder(Path(reference), reference)


def read_task_folder(folder: Path, reference: str) -> Task:
    """Read and check a task's folder.

    Args:
        folder: The folder.
        reference: The task's reference, for error messages.

    Returns:
        The task with its examples.

    Raises:
        UsageError: The card is not valid.
        IntegrityError: The examples are missing or damaged.
        HubError: The task has no examples.
    """
    card = yaml_files.validate(Card, yaml_files.read(folder / CARD), "docs/registry.md")
    path = folder / EXAMPLES
    if not path.is_file():
        raise IntegrityError(f"task {reference} has no {EXAMPLES}", "import the task again")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path} is not text: {error}", "save it as UTF-8") from None
    examples: dict[str, Example] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        try:
            example = Example.model_validate_json(line)
            int(example.id, 16)
        except (ValidationError, ValueError) as error:
            found = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise IntegrityError(f"{path}, line {number}: {found}", "correct this line") from None
        examples[example.id] = example
    if not examples:
        raise HubError(f"task {reference} is empty: {path} has no examples", "add examples to it")
    return Task(reference, card, tuple(examples[key] for key in sorted(examples)))


def list_references() -> list[str]:
    """List the references of all imported tasks; other folders than imports make are omitted.

    Returns:
        `suite:name` of each task, sorted.
    """
    root = tasks_folder()
    folders = [p.parent.relative_to(root) for p in walk_files(root) if p.name == CARD]
    names = (f"{f.parts[0]}:{'/'.join(f.parts[1:])}" for f in folders if len(f.parts) > 1)
    return sorted(filter(is_reference, names))


def is_named_by_card(folder: Path) -> bool:
    """Tell whether a folder holds a task of the folder's own name; a draft of a task has another.

    Args:
        folder: A folder with the name of a draft.

    Returns:
        Whether its card has the name.
    """
    try:
        card = yaml_files.read(folder / CARD).value
    except (OSError, HubError):
        return False
    return isinstance(card, dict) and str(card.get("name")).rpartition("/")[2] == folder.name


def write_task(
    suite: str,
    card: Card,
    examples: Iterable[Example],
    source: Path | None = None,
    renew: bool = False,
) -> str:
    """Write a task to `$HUB_HOME/tasks`; do nothing if it is there with the same content.

    Args:
        suite: The suite of the task.
        card: Its description.
        examples: Its examples.
        source: The folder that the task comes from.
        renew: Replace a damaged task, if the new files are those that were imported before.

    Returns:
        The reference of the task.

    Raises:
        HubError: There are no examples.
        ConflictError: The name is taken by a task with other content.
        IntegrityError: With `renew`, the new files are not those that were imported before.
    """
    reference = f"{suite}:{card.name}"
    target = _locate_task(suite, card.name)
    task = Task(
        reference, card, tuple(sorted({e.id: e for e in examples}.values(), key=lambda e: e.id))
    )
    if not task.examples:
        raise HubError(f"task {reference} is empty", "choose a task with usable examples")
    if (target / CARD).is_file() and not renew:
        if read_task_folder(target, reference).digest == task.digest:
            return reference
        raise ConflictError(f"{reference} exists with other content", f"remove {target} first")
    with create_folder(target, renew) as draft:
        record = card.model_dump(mode="json", exclude_none=True)
        write_text(draft / CARD, yaml_files.dump(record))
        lines = (e.model_dump(exclude_none=True) for e in task.examples)
        text = "".join(encode_json(line) + "\n" for line in lines)
        write_text(draft / EXAMPLES, text)
        files = {name: sha256_of(draft / name) for name in (CARD, EXAMPLES)}
        before = checksummed_text.read_manifest(target)
        if before and before["files"] != files:
            raise IntegrityError(
                f"the source of {reference} has changed",
                f"remove {target} and import the task again",
            )
        checksummed_text.write_manifest(draft, files, str(source.resolve()) if source else None)
    return reference


def reimport_from_folder(reference: str, source: Path) -> None:
    """Replace a damaged task with the folder that it was imported from.

    Args:
        reference: The reference of the task.
        source: The folder.

    Raises:
        NotFoundError: The folder does not exist any more.
        IntegrityError: The folder has other content than before.
    """
    if not (source / CARD).is_file():
        raise NotFoundError(
            f"the source {source} of {reference} does not exist any more",
            "import the task from another folder",
        )
    task = read_task_folder(source, reference)
    write_task(reference.partition(":")[0], task.card, task.examples, source, renew=True)


def import_folder(folder: Path, suite: str) -> list[str]:
    """Import a task's folder, or every task folder directly inside it.

    Args:
        folder: The folder.
        suite: The suite that the tasks are put into.

    Returns:
        The references of the tasks.

    Raises:
        NotFoundError: The folder contains no task.
        ConflictError: A name is taken by a task with other content.
    """
    folders = (
        [folder]
        if (folder / CARD).is_file()
        else sorted(p.parent for p in folder.glob(f"*/{CARD}"))
    )
    if not folders:
        raise NotFoundError(
            f"{folder} contains no {CARD}", "see docs/registry.md for the format of a task"
        )
    tasks = [read_task_folder(f, f"{suite}:{f.name}") for f in folders]
    return [
        write_task(suite, task.card, task.examples, source)
        for task, source in zip(tasks, folders, strict=True)
    ]
