"""Task: every example goes to the expert of its own task, which the caller names."""

from __future__ import annotations

from typing import Literal

import torch
from experthub.merge import MethodError
from experthub.routing._pool import Batch, Pool, Select, one_hot
from experthub.routing._router import Weights
from experthub.routing._routers import Routing, routers


@routers.register(
    paper="https://arxiv.org/abs/2408.07057",
    needs=("task",),
    routing=Routing("task", "model", sparse=True, zero_shot=False),
)
def task(pool: Pool, *, unknown: Literal["average", "base", "refuse"] = "average") -> Select:
    """Use the expert that has the task's name, or that was trained on that task.

    The caller names the task of every row around the model, `with composition.tasks([...])`;
    `hub eval` names each task that it measures.

    Args:
        pool: The experts and their tasks.
        unknown: The experts for a task that no expert was trained on. `average` uses the mean of all
            experts, `base` uses none of them, and `refuse` raises an error.

    Returns:
        A function from rows to weights.
    """
    known = {name: e for e, names in reversed(list(enumerate(pool.tasks))) for name in names}
    known |= {label: e for e, label in enumerate(pool.labels)}
    other = 1 / pool.n_experts if unknown == "average" else 0.0

    def select(batch: Batch) -> Weights:
        names = batch.tasks
        values_BE = torch.full((len(names), pool.n_experts), other)
        for row, name in enumerate(names):
            if name in known:
                values_BE[row] = one_hot(known[name], pool.n_experts)
            elif unknown == "refuse":
                if not name:
                    raise MethodError(
                        "no task was named for this call of the model",
                        "call the model in a block of with composition.tasks(TASK), "
                        "in the thread that runs it",
                    )
                raise MethodError(
                    f"no expert was trained on the task {name!r}",
                    f"set unknown: average, or name one of {', '.join(known)}",
                )
        return Weights(values_BE)

    return select
