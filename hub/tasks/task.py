"""Tasks: examples with their right answers, split by content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from experthub.hub.errors import ConflictError, HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.atomic import (
    canonical_json,
    digest_of,
    files_below,
    hub_home,
    new_folder,
    sha256_of,
    write_text,
)
from experthub.hub.files.yaml_files import Closed, did_you_mean
from pydantic import Field, ValidationError, model_validator

Split = Literal["train", "validation", "test", "all"]
CARD, EXAMPLES = "card.yaml", "examples.jsonl"
CHOICE = "\n  choice: "


class Card(Closed):
    """What a task is: card.yaml.

    source: the dataset underneath.  template: the prompt, with `{input}` and, to list the answers,
    `{choices}`.  labels: fixed ones, the same for every example.
    """

    name: str
    source: str
    license: str | None = None
    category: str | None = None
    kind: Literal["choices", "generation", "labels"] = "choices"
    metric: str = "accuracy"
    template: str = "{input}\nAnswer:"
    labels: list[str] | None = None

    @model_validator(mode="after")
    def _has_input(self) -> Card:
        if "{input}" not in self.template:
            raise ValueError("the template has no {input}")
        return self


class Example(Closed):
    """One line of examples.jsonl: `choices` and `answer`, the index of the right one; or `targets`."""

    id: str
    input: str
    choices: Annotated[list[str], Field(min_length=2)] | None = None
    answer: Annotated[int, Field(ge=0)] | None = None
    targets: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Example:
        if (self.choices is None) == (self.targets is None):
            raise ValueError("expected either choices with an answer, or targets")
        if self.choices is not None and not 0 <= (-1 if self.answer is None else self.answer) < len(
            self.choices
        ):
            raise ValueError(f"the answer {self.answer} is none of the {len(self.choices)} choices")
        return self

    @property
    def part(self) -> Split:
        """The split this example belongs to."""
        place = int(self.id, 16) % 100
        return "train" if place < 70 else "validation" if place < 85 else "test"


def example_id(text: str, choices: Iterable[str]) -> str:
    """16 hex digits of the hash of input and choices: equal examples share a split."""
    return hashlib.sha256(canonical_json([text, *choices])).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """A task with its examples, sorted by id."""

    reference: str
    card: Card
    examples: tuple[Example, ...]

    @property
    def digest(self) -> str:
        return digest_of(
            [self.card.model_dump(mode="json"), [e.model_dump(mode="json") for e in self.examples]]
        )

    def split(self, name: Split, limit: int | None = None) -> list[Example]:
        """The examples of a split, at most `limit`, always the same ones; HubError when none."""
        chosen = [e for e in self.examples if name in ("all", e.part)]
        if not chosen:
            counts = Counter(example.part for example in self.examples)
            there = ", ".join(f"{count} {part}" for part, count in counts.items())
            raise HubError(
                f"task {self.reference} has no {name} examples",
                f"it has {len(self.examples)} in all: {there}",
            )
        return chosen[:limit]

    def prompt(self, example: Example) -> str:
        """The text before the answer."""
        listed = "".join(CHOICE + choice for choice in example.choices or ())
        template = self.card.template.replace("{choices}", "\0")
        return template.replace("{input}", example.input).replace("\0", listed)

    @property
    def ranked(self) -> bool:
        """Whether every example has choices, of its own or the card's labels, to rank."""
        return all(self.choices(e) and self.answer(e) is not None for e in self.examples)

    def choices(self, example: Example) -> list[str]:
        """What the answer is one of: the example's choices, or the card's labels."""
        return example.choices or self.card.labels or []

    def answer(self, example: Example) -> int | None:
        """The place of the right answer among the choices; None when it is not among them."""
        if example.choices is not None:
            return example.answer
        labels, targets = self.card.labels or [], example.targets or []
        return labels.index(targets[0]) if targets and targets[0] in labels else None

    def right_answer(self, example: Example) -> str:
        """What should follow the prompt."""
        if example.choices is not None and example.answer is not None:
            return " " + example.choices[example.answer]
        return " " + (example.targets or [""])[0]


@dataclass(frozen=True)
class Chosen:
    """A task and some of its examples."""

    task: Task
    examples: tuple[Example, ...]

    @property
    def labels(self) -> list[int]:
        """The places of the right answers."""
        return [self.task.answer(example) or 0 for example in self.examples]


def as_split(text: str) -> Split:
    """The name of a split; UsageError for any other."""
    if text not in get_args(Split):
        raise UsageError(f"unknown split {text!r}", f"use one of {', '.join(get_args(Split))}")
    return cast(Split, text)


def tasks_folder() -> Path:
    return hub_home() / "tasks"


def _folder_of(suite: str, name: str) -> Path:
    """Where a task is kept; UsageError for a name that leads elsewhere."""
    if {"", ".", ".."} & {*suite.split("/"), *name.split("/")}:
        raise UsageError(f"'{suite}:{name}' is no task", "write suite:name or a folder")
    return tasks_folder() / suite / name


def read_task(reference: str) -> Task:
    """A task by `suite:name` or folder.

    Raises NotFoundError with a did-you-mean, IntegrityError for a damaged one, HubError for one
    without examples.
    """
    suite, colon, name = reference.partition(":")
    if colon and not reference.startswith(("/", ".")):
        folder = _folder_of(suite, name)
        if not (folder / CARD).is_file():
            hint = f"run hub tasks import {suite} {name}" if suite == "bigbench" else ""
            known = [n for s, _, n in (r.partition(":") for r in list_references()) if s == suite]
            close = did_you_mean(name, known, f"{suite}:")
            raise NotFoundError(
                f"there is no task {reference} here",
                close if close.startswith("did") else hint or "see hub tasks list",
            )
        return read_folder(folder, reference)
    if not (Path(reference) / CARD).is_file():
        raise NotFoundError(f"there is no task {reference}", f"its folder needs a {CARD}")
    return read_folder(Path(reference), reference)


def read_folder(folder: Path, reference: str) -> Task:
    """Read and check a task's folder."""
    card = yaml_files.validated(Card, yaml_files.read(folder / CARD), "docs/registry.md")
    path = folder / EXAMPLES
    if not path.is_file():
        raise IntegrityError(f"task {reference} has no {EXAMPLES}", "import it again")
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
            raise IntegrityError(f"{path}, line {number}: {found}", "mend it") from None
        examples[example.id] = example
    if not examples:
        raise HubError(f"task {reference} is empty", f"{path} has no examples")
    return Task(reference, card, tuple(examples[key] for key in sorted(examples)))


def list_references() -> list[str]:
    """Every imported task."""
    root = tasks_folder()
    folders = [p.parent.relative_to(root) for p in files_below(root) if p.name == CARD]
    return sorted(f"{f.parts[0]}:{'/'.join(f.parts[1:])}" for f in folders if len(f.parts) > 1)


def write_task(
    suite: str,
    card: Card,
    examples: Iterable[Example],
    source: Path | None = None,
    renew: bool = False,
) -> str:
    """Write a task under `$HUB_HOME/tasks`; returns its reference.

    The same content again is a no-op; ConflictError when the name has other content.  source: the
    folder that it comes from.  renew: put it in the place of a damaged one, if its files are then
    those that were there.
    """
    reference = f"{suite}:{card.name}"
    target = _folder_of(suite, card.name)
    task = Task(
        reference, card, tuple(sorted({e.id: e for e in examples}.values(), key=lambda e: e.id))
    )
    if not task.examples:
        raise HubError(f"task {reference} is empty", "it has no usable examples")
    if (target / CARD).is_file() and not renew:
        if read_folder(target, reference).digest == task.digest:
            return reference
        raise ConflictError(f"{reference} exists with other content", f"remove {target} first")
    with new_folder(target, renew) as draft:
        record = card.model_dump(mode="json", exclude_none=True)
        write_text(draft / CARD, yaml_files.dump(record))
        lines = (e.model_dump(exclude_none=True) for e in task.examples)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(draft / EXAMPLES, text)
        files = {name: sha256_of(draft / name) for name in (CARD, EXAMPLES)}
        before = checksummed_text.read_manifest(target)
        if before and before["files"] != files:
            raise IntegrityError(f"the source of {reference} has changed", "remove and import it")
        checksummed_text.write_manifest(draft, files, str(source.resolve()) if source else None)
    return reference


def import_again(reference: str, source: Path) -> None:
    """Put a damaged task in the place of itself, from the folder that it was imported from."""
    if not (source / CARD).is_file():
        raise NotFoundError(f"its source {source} is gone", "import it from elsewhere")
    task = read_folder(source, reference)
    write_task(reference.partition(":")[0], task.card, task.examples, source, renew=True)


def import_folder(folder: Path, suite: str) -> list[str]:
    """Import a task's folder, or every task folder directly inside it."""
    folders = (
        [folder]
        if (folder / CARD).is_file()
        else sorted(p.parent for p in folder.glob(f"*/{CARD}"))
    )
    if not folders:
        raise NotFoundError(f"{folder} holds no {CARD}", "see docs/registry.md for the format")
    tasks = [read_folder(f, f"{suite}:{f.name}") for f in folders]
    return [
        write_task(suite, task.card, task.examples, source)
        for task, source in zip(tasks, folders, strict=True)
    ]
