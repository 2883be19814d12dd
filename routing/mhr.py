"""MHR: Poly with several heads, each of which mixes a slice of the skills by weights of its own.

Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization",
https://arxiv.org/abs/2211.03831, section 3.
"""

from __future__ import annotations

from typing import Annotated

from experthub.merge import LowRank, TaskName
from experthub.routing._routers import Routing, routers
from experthub.routing._skills import Skills


@routers.register(
    paper="https://arxiv.org/abs/2211.03831",
    needs=("skills",),
    routing=Routing("task", "module", combines=("parameters",)),
)
def mhr(skills: Skills, *, task: Annotated[str | None, TaskName] = None) -> LowRank:
    """A task's mixture of an inventory's skills, head by head; it folds to one plain LoRA.

    Made by `hub train skills --router mhr`.

    task: one that the inventory was trained on, or `average`, the mean of the skills (MHR-mu without
    adaptation); without it every row of a batch may have its own (`composition.tasks`).
    """
    return skills.fold(task or "average")
