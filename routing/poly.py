"""Poly: every task uses its own mixture of an inventory's skills, at each module.

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
    """Mix the skills of an inventory for a task, which gives one LoRA without extra cost at run time.

    `hub train skills --router poly` trains the inventory.

    Args:
        skills: The skills of a module.
        task: A task that the inventory was trained on, or `average`, the mean of the skills, for other
            tasks. If it is null, `composition.tasks` gives every row of a batch its own task.

    Returns:
        The LoRA of the mixture.

    Raises:
        KeyError: The inventory was not trained on the task.
    """
    return skills.fold(task)
