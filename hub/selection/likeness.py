"""How much a task resembles those that experts were trained on, by a sentence encoder.

An expert is the mean embedding of some of its examples, as LoraRetriever has it (Zhao et al.,
https://arxiv.org/abs/2402.09997, section 4.1).

Shapes: N texts, E experts, D features of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from experthub.hub.bases import Report
from experthub.hub.errors import HubError
from experthub.hub.plan import Plan, PlannedExpert
from experthub.hub.tasks.task import Task, read_task
from torch import Tensor

Embed = Callable[[Sequence[str]], Tensor]


def mean_embedding(embed: Embed, texts: Sequence[str]) -> Tensor:
    """The direction `[D]` of the mean of unit embeddings."""
    return torch.nn.functional.normalize(embed(texts).mean(0), dim=0)


def own_embeddings(
    plan: Plan, embed: Embed, texts_of: Callable[[Task], Sequence[str]], report: Report
) -> list[Tensor | None]:
    """Every expert's mean embedding `[D]`, of texts of its own tasks; None where none is here."""
    found: dict[tuple[str, ...], Tensor | None] = {}
    for number, expert in enumerate(plan.experts):
        report("embedding examples of the experts' own tasks", number, len(plan.experts))
        names = tuple(member.task for member in expert.members if member.task)
        if names not in found:
            texts = [text for own in _here(expert, names, texts_of, report) for text in own]
            found[names] = mean_embedding(embed, texts) if texts else None
    report("embedding examples of the experts' own tasks", len(plan.experts), len(plan.experts))
    return [found[tuple(m.task for m in e.members if m.task)] for e in plan.experts]


def _here(
    expert: PlannedExpert,
    names: Sequence[str],
    texts_of: Callable[[Task], Sequence[str]],
    report: Report,
) -> list[Sequence[str]]:
    """Texts of an expert's tasks, of those that are imported and have some."""
    found = []
    for name in names:
        try:
            found.append(texts_of(read_task(name)))
        except HubError as error:
            report(f"note: {expert.label}: {error.message}: {error.hint}", 0, 0)
    return found
