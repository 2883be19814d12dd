"""Prompts of a trace: the examples of a task."""

from __future__ import annotations

from experthub.hub.bases.base import Base
from experthub.hub.readers.features import format_text
from experthub.hub.tasks.task_files import read_task


def read_prompts(base: Base, reference: str, limit: int) -> list[str]:
    """Read prompts from the first examples of a task, of all splits.

    Args:
        base: The base that reads the prompts.
        reference: The reference of the task.
        limit: The largest number of examples.

    Returns:
        The filled template for a causal language model, or the input alone for another base.
    """
    task, causal = read_task(reference), base.is_causal
    return [format_text(task, e, causal) for e in task.split("all", limit)]
