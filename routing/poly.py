"""Poly: every task has its own mixture of the skills of an inventory, at each module.

Ponti et al., "Combining Modular Skills in Multitask Learning", https://arxiv.org/abs/2202.13914,
section 2.
"""

from __future__ import annotations

from typing import Annotated

from experthub.merge import LowRank, TaskName
from experthub.routing._routers import Routing, routers
from experthub.routing._skills import Skills


@routers.register(
    paper="https://arxiv.org/abs/2202.13914",
    needs=("skills",),
    routing=Routing("task", "module", combines=("parameters",)),
)
def poly(skills: Skills, *, task: Annotated[str | None, TaskName] = None) -> LowRank:
    """A task's mixture of an inventory's skills, which folds to one plain LoRA: no cost at run time.

    Made by `hub train skills --router poly`.

    task: one that the inventory was trained on, or `average`, the mean of the skills, for tasks that
    it was not; without it every row of a batch may have its own (`composition.tasks`).
    """
    return skills.fold(task or "average")
