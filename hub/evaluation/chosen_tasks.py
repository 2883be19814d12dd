"""The tasks of an evaluation: their examples, and the refusal of those that experts have seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experthub.hub.errors import HubError, UsageError
from experthub.hub.recipes.plan import Plan
from experthub.hub.tasks.task import Chosen, Split, Task
from experthub.hub.tasks.task_files import read_task


def check_tasks(
    tasks: Sequence[str], plans: Mapping[str, Plan], split: Split, limit: int | None
) -> None:
    """Validate tasks early, with the same checks as `evaluate`.

    Args:
        tasks: References of tasks.
        plans: The plans to evaluate, by name.
        split: The split of the tasks.
        limit: The largest number of examples per task.

    Raises:
        UsageError: A task has no choices to rank, or `split="all"` is used with a task on which an
            expert was trained.
        HubError: A task cannot be read, or the split has no examples.
    """
    chosen = read_chosen(tasks, split, limit)
    if split == "all":
        refuse_trained(plans, [one.task for one in chosen])


def read_chosen(references: Sequence[str], split: Split, limit: int | None) -> list[Chosen]:
    """Read tasks with the requested examples.

    Args:
        references: References of tasks.
        split: The split of their examples.
        limit: The largest number of examples of each task.

    Returns:
        The tasks with their examples.

    Raises:
        UsageError: A task has no choices to rank.
        HubError: A task cannot be read, or the split has no examples.
    """
    chosen = []
    for task in (read_task(reference) for reference in references):
        if not task.has_choices:
            raise UsageError(f"task {task.reference} has no choices to rank", "choose another task")
        chosen.append(Chosen(task, tuple(task.split(split, limit))))
    return chosen


def refuse_trained(plans: Mapping[str, Plan], tasks: Sequence[Task]) -> None:
    """Refuse tasks, by content, on which an expert of a recipe was trained.

    Args:
        plans: The plans to evaluate, by name.
        tasks: The tasks.

    Raises:
        UsageError: An expert was trained on one of the tasks.
    """
    unseen = {task.digest: task.reference for task in tasks}
    for name, plan in plans.items():
        for member in plan.members:
            trained = _find_digest(member.task, tasks)
            if trained in unseen:
                raise UsageError(
                    f"{member.reference}, an expert of {name}, was trained on {unseen[trained]}, "
                    "and --split all includes its training examples",
                    "use --split test, whose examples were not used in training",
                )


def _find_digest(reference: str | None, tasks: Sequence[Task]) -> str | None:
    """Find the digest of the task that an expert was trained on; None if it is not imported."""
    for task in tasks:
        if task.reference == reference:
            return task.digest
    try:
        return read_task(reference).digest if reference else None
    except HubError:
        return None
