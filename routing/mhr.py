"""MHR: Poly with several heads; each head mixes one slice of the skills with its own weights.

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
    """Mix the skills of an inventory for a task, head by head, which gives one LoRA.

    `hub train skills --router mhr` trains the inventory.

    Args:
        skills: The skills of a module.
        task: A task that the inventory was trained on, or `average`, the mean of the skills (MHR-mu
            without adaptation). If it is null, `composition.tasks` gives every row of a batch its own
            task.

    Returns:
        The LoRA of the mixture.

    Raises:
        KeyError: The inventory was not trained on the task.
    """
    return skills.fold(task)
