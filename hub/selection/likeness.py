"""How much a task resembles those that experts were trained on, by a sentence encoder.

An expert is the mean embedding of some of its examples, as LoraRetriever has it (Zhao et al.,
https://arxiv.org/abs/2402.09997, section 4.1).

Shapes: N texts, E experts, D features of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from experthub.hub.errors import HubError
from experthub.hub.progress import Report
from experthub.hub.recipes.plan import Plan, PlannedExpert
from experthub.hub.tasks.task import Task
from experthub.hub.tasks.task_files import read_task
from torch import Tensor

Embed = Callable[[Sequence[str]], Tensor]


def mean_embedding(embed: Embed, texts: Sequence[str]) -> Tensor:
    """The direction `[D]` of the mean of unit embeddings."""
    return torch.nn.functional.normalize(embed(texts).mean(0), dim=0)


def own_texts(
    plan: Plan, texts_of: Callable[[Task], Sequence[str]], report: Report
) -> dict[str, Sequence[str]]:
    """Texts of the tasks that experts were trained on, of those that are imported and have some."""
    found: dict[str, Sequence[str]] = {}
    for expert in plan.experts:
        for name in own_tasks(expert):
            if name not in found:
                try:
                    found[name] = texts_of(read_task(name))
                except HubError as error:
                    found[name] = ()
                    report(f"note: {expert.label}: {error.message}: {error.hint}", 0, 0)
    return {name: texts for name, texts in found.items() if texts}


def own_tasks(expert: PlannedExpert) -> tuple[str, ...]:
    return tuple(member.task for member in expert.members if member.task)


def own_embeddings(
    plan: Plan, embed: Embed, texts: Mapping[str, Sequence[str]], report: Report
) -> list[Tensor | None]:
    """Every expert's mean embedding `[D]`, of texts of its own tasks; None where none is here."""
    found: dict[tuple[str, ...], Tensor | None] = {}
    what = "embedding examples of the experts' own tasks"
    for number, expert in enumerate(plan.experts):
        report(what, number, len(plan.experts))
        names = own_tasks(expert)
        if names not in found:
            own = [text for name in names for text in texts.get(name, ())]
            found[names] = mean_embedding(embed, own) if own else None
    report(what, len(plan.experts), len(plan.experts))
    return [found[own_tasks(expert)] for expert in plan.experts]
