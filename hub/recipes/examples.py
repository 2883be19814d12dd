"""Which examples a learned merge sees, and their digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.digests import digest_of
from experthub.hub.recipes.recipe import DataUse
from experthub.hub.tasks.task import Chosen, Example, Split, Task
from experthub.hub.tasks.task_files import read_task


@dataclass(frozen=True)
class PlannedData:
    """What a recipe says of its data, and the digest of each task as it is now."""

    use: DataUse
    digests: tuple[str, ...]

    @classmethod
    def of(cls, use: DataUse) -> PlannedData:
        """Read the tasks and check that the recipe's examples are there."""
        return cls(use, tuple(one.task.digest for one in chosen(use)))

    @property
    def digest(self) -> str:
        """Of everything that decides which examples are seen, in which order of tasks."""
        record = self.use.model_dump(mode="json", exclude={"tasks"})
        return digest_of([record, list(self.digests)])

    def record(self) -> dict[str, Any]:
        """As plain values, for a lock file."""
        tasks = zip(self.use.tasks, self.digests, strict=True)
        rest = self.use.model_dump(mode="json", exclude={"tasks"}, exclude_none=True)
        return {"tasks": [{"task": task, "digest": digest} for task, digest in tasks], **rest}


def chosen(use: DataUse) -> list[Chosen]:
    """The examples that a recipe's data means; UsageError for a task that has no choices."""
    return [_of_task(read_task(reference), use, use.split) for reference in use.tasks]


def held_out(use: DataUse, given: Sequence[Chosen]) -> list[Chosen] | None:
    """Labelled examples to stop by, as many as are learned from; None where nothing may be seen.

    given: what is learned from.  They are of the validation split; data of that split itself leaves none.
    """
    if not use.labels or use.split == "validation":
        return None
    try:
        return [_of_task(one.task, use, "validation") for one in given]
    except HubError:  # a small task may have none
        return None


def few(task: Task, shots: int) -> list[Example]:
    """As many examples of the training split in all, in turn of each class."""
    examples = task.split("train")
    by_class: dict[str, list[Example]] = {}
    for example in examples:
        answer = task.answer(example)
        choices = task.choices(example)
        by_class.setdefault("" if answer is None else choices[answer], []).append(example)
    if task.card.labels is None and len(by_class) > len(examples) // 2:
        return list(examples[:shots])  # each example has choices of its own
    turns = zip_longest(*by_class.values())
    return [e for turn in turns for e in turn if e is not None][:shots]


def _of_task(task: Task, use: DataUse, split: Split) -> Chosen:
    if not task.ranked:
        raise UsageError(
            f"task {task.reference} has no choices, and learning compares those",
            "choose another task",
        )
    examples = task.split(split)
    if use.shots is not None:
        examples = _shots(task, examples, use.shots)
    return Chosen(task, tuple(examples[: use.limit]))


def _shots(task: Task, examples: Sequence[Example], shots: int) -> list[Example]:
    """The first examples of each class; where each has choices of its own, as many in all."""
    if task.card.labels is None and len({tuple(sorted(task.choices(e))) for e in examples}) > 1:
        return list(examples[: shots * len(task.choices(examples[0]))])
    found: dict[str, list[Example]] = {}
    for example in examples:
        answer = task.choices(example)[task.answer(example) or 0]
        found.setdefault(answer, []).append(example)
    return [example for group in found.values() for example in group[:shots]]
