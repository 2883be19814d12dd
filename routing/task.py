"""Task: every example goes to the expert of its own task, which somebody names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from experthub.merge import Routing
from experthub.routing._methods import routers
from experthub.routing._pool import Pool, Select
from experthub.routing._router import Weights


@routers.register(
    paper="https://arxiv.org/abs/2408.07057",
    needs=("task",),
    routing=Routing("task", "model", sparse=True, zero_shot=False),
)
def task(pool: Pool, *, unknown: Literal["average", "base", "refuse"] = "average") -> Select:
    """The expert that is called so, or that was trained on that task.

    The task of every row is said around the model, `with composition.tasks([...])`; `hub eval` says
    it of each task that it measures.

    unknown: what serves a task of no expert: `average`, the mean of all; `base`, none of them;
    `refuse`, an error.
    """
    known = {name: e for e, names in reversed(list(enumerate(pool.tasks))) for name in names}
    known |= {label: e for e, label in enumerate(pool.labels)}
    other = 1 / pool.n_experts if unknown == "average" else 0.0

    def select(names: Sequence[str]) -> Weights:
        values_BE = torch.full((len(names), pool.n_experts), other)
        for row, name in enumerate(names):
            if name in known:
                values_BE[row] = torch.eye(pool.n_experts)[known[name]]
            elif unknown == "refuse":
                raise ValueError(f"no expert for the task {name!r}: there are {', '.join(known)}")
        return Weights(values_BE)

    return select
