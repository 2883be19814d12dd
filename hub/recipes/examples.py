"""The examples that a method sees, and their digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.digests import digest_of
from experthub.hub.recipes.entries import DataUse
from experthub.hub.tasks.task import Chosen, Example, Split, Task
from experthub.hub.tasks.task_files import read_task


@dataclass(frozen=True)
class PlannedData:
    """The data of a recipe, with the digest of each task as it is now.

    Attributes:
        use: The recipe's `data:`.
        digests: The digest of each task.
    """

    use: DataUse
    digests: tuple[str, ...]

    @classmethod
    def of(cls, use: DataUse) -> PlannedData:
        """Read the tasks, and check that the recipe's examples exist.

        Args:
            use: The recipe's `data:`.

        Returns:
            The data with the digests of the tasks.

        Raises:
            NotFoundError: A task or its split does not exist.
            UsageError: A task has no choices.
        """
        return cls(use, tuple(one.task.digest for one in choose_examples(use)))

    @property
    def digest(self) -> str:
        """The digest of everything that decides which examples are seen, and in which order."""
        record = self.use.model_dump(mode="json", exclude={"tasks"})
        return digest_of([record, list(self.digests)])

    def record(self) -> dict[str, Any]:
        """Return the data as plain values, for a lock file.

        Returns:
            The keys of `data:`, with a digest for each task.
        """
        tasks = zip(self.use.tasks, self.digests, strict=True)
        rest = self.use.model_dump(mode="json", exclude={"tasks"}, exclude_none=True)
        return {"tasks": [{"task": task, "digest": digest} for task, digest in tasks], **rest}


def choose_examples(use: DataUse) -> list[Chosen]:
    """Choose the examples that a recipe's data refers to.

    Args:
        use: The recipe's `data:`.

    Returns:
        The examples of each task.

    Raises:
        UsageError: A task has no choices.
    """
    return [_choose(read_task(reference), use, use.split) for reference in use.tasks]


def hold_out(use: DataUse, given: Sequence[Chosen]) -> list[Chosen] | None:
    """Choose labelled examples of the validation split, on which early stopping is decided.

    Args:
        use: The recipe's `data:`.
        given: The examples that are learned from.

    Returns:
        As many examples of each task; None if the method may not see labels, if it learns from the
        validation split itself, or if a task has no such split.
    """
    if not use.labels or use.split == "validation":
        return None
    try:
        return [_choose(one.task, use, "validation") for one in given]
    except HubError:  # a small task may have none
        return None


def choose_few(task: Task, shots: int) -> list[Example]:
    """Choose a few examples of the training split, in turn of each class.

    Args:
        task: The task.
        shots: The number of examples in all.

    Returns:
        The examples.
    """
    examples = task.split("train")
    by_class: dict[str, list[Example]] = {}
    for example in examples:
        answer = task.find_answer(example)
        choices = task.list_choices(example)
        by_class.setdefault("" if answer is None else choices[answer], []).append(example)
    if task.card.labels is None and len(by_class) > len(examples) // 2:
        return list(examples[:shots])  # each example has choices of its own
    turns = zip_longest(*by_class.values())
    return [e for turn in turns for e in turn if e is not None][:shots]


def _choose(task: Task, use: DataUse, split: Split) -> Chosen:
    """Choose the examples of one task."""
    if not task.has_choices:
        raise UsageError(
            f"task {task.reference} has no choices, and learning compares those",
            "choose another task",
        )
    examples = task.split(split)
    if use.shots is not None:
        examples = _choose_shots(task, examples, use.shots)
    return Chosen(task, tuple(examples[: use.limit]))


def _choose_shots(task: Task, examples: Sequence[Example], shots: int) -> list[Example]:
    """Choose the first examples of each class, or as many in all if choices differ by example."""
    if (
        task.card.labels is None
        and len({tuple(sorted(task.list_choices(e))) for e in examples}) > 1
    ):
        return list(examples[: shots * len(task.list_choices(examples[0]))])
    found: dict[str, list[Example]] = {}
    for example in examples:
        answer = task.list_choices(example)[task.require_answer(example)]
        found.setdefault(answer, []).append(example)
    return [example for group in found.values() for example in group[:shots]]
