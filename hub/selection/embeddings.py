"""Embeddings of experts: a sentence encoder embeds examples of the tasks they were trained on.

An expert is represented by the mean embedding of some of its training examples, as in LoraRetriever
(Zhao et al., https://arxiv.org/abs/2402.09997, section 4.1).

Shapes: N texts, E experts, D features of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from experthub.hub.errors import HubError
from experthub.hub.progress import Report
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.planned_experts import PlannedExpert
from experthub.hub.tasks.task import Task
from experthub.hub.tasks.task_files import read_task
from torch import Tensor

Embed = Callable[[Sequence[str]], Tensor]


def average_embeddings(embed: Embed, texts: Sequence[str]) -> Tensor:
    """Embed texts, and normalise the mean of their embeddings.

    Args:
        embed: A function from texts to unit embeddings `[N, D]`.
        texts: The texts, at least one.

    Returns:
        The normalised mean `[D]`.
    """
    return torch.nn.functional.normalize(embed(texts).mean(0), dim=0)


def read_own_texts(
    plan: Plan, texts_of: Callable[[Task], Sequence[str]], report: Report
) -> dict[str, Sequence[str]]:
    """Read texts of the tasks that the experts were trained on.

    A task that cannot be read is reported and omitted.

    Args:
        plan: The experts.
        texts_of: A function that reads texts of a task.
        report: A progress callback.

    Returns:
        Reference of a task -> its texts, at least one.
    """
    found: dict[str, Sequence[str]] = {}
    for expert in plan.experts:
        for name in list_own_tasks(expert):
            if name not in found:
                try:
                    found[name] = texts_of(read_task(name))
                except HubError as error:
                    found[name] = ()
                    report(f"note: {expert.label}: {error.message}: {error.hint}", 0, 0)
    return {name: texts for name, texts in found.items() if texts}


def list_own_tasks(expert: PlannedExpert) -> tuple[str, ...]:
    """List the tasks that an expert was trained on.

    Args:
        expert: An expert; a nested merge has several members.

    Returns:
        References of the tasks that are known.
    """
    return tuple(member.task for member in expert.members if member.task)


def embed_own_tasks(
    plan: Plan, embed: Embed, texts: Mapping[str, Sequence[str]], report: Report
) -> list[Tensor | None]:
    """Compute the mean embedding of texts of every expert's own tasks.

    Args:
        plan: The experts.
        embed: A function from texts to unit embeddings `[N, D]`.
        texts: Reference of a task -> its texts; see `read_own_texts`.
        report: A progress callback.

    Returns:
        One embedding `[D]` per expert; None for an expert without texts.
    """
    found: dict[tuple[str, ...], Tensor | None] = {}
    what = "embedding examples of the experts' own tasks"
    for number, expert in enumerate(plan.experts):
        report(what, number, len(plan.experts))
        names = list_own_tasks(expert)
        if names not in found:
            own = [text for name in names for text in texts.get(name, ())]
            found[names] = average_embeddings(embed, own) if own else None
    report(what, len(plan.experts), len(plan.experts))
    return [found[list_own_tasks(expert)] for expert in plan.experts]
