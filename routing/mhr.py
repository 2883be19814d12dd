"""MHR: Poly with several heads, each of which mixes a slice of the skills by weights of its own.

Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization",
https://arxiv.org/abs/2211.03831, section 3.
"""

from __future__ import annotations

from experthub.merge import LowRank, Routing
from experthub.routing._methods import routers
from experthub.routing._skills import Skills


@routers.register(
    paper="https://arxiv.org/abs/2211.03831",
    needs=("skills",),
    routing=Routing("task", "module", combines=("parameters",)),
)
def mhr(skills: Skills, *, task: str | None = None) -> LowRank:
    """A task's mixture of an inventory's skills, head by head; it folds to one plain LoRA.

    Made by `hub train skills --router mhr`.

    task: one that the inventory was trained on, or `average`, the mean of the skills (MHR-mu without
    adaptation); without it every row of a batch may have its own (`composition.tasks`).
    """
    return skills.fold(task or "average")
