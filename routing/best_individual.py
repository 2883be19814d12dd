"""Best individual: the one expert that does best on some labelled examples, for every input."""

from __future__ import annotations

from experthub.merge import Routing
from experthub.routing._methods import routers
from experthub.routing._pool import Pool, Select, one_hot
from experthub.routing._router import Weights


@routers.register(
    paper="https://arxiv.org/abs/2402.05859",
    needs=("data",),
    learns=True,
    labelled=lambda options: True,
    routing=Routing("nothing", "model", sparse=True, zero_shot=False),
)
def best_individual(pool: Pool) -> Select:
    """The expert with the highest accuracy on the recipe's data, the mean over its tasks.

    As the paper's "best individual" when that data is of the tasks to be measured.
    """
    best = int(pool.state["scores"].argmax())
    weights = Weights(one_hot(best, pool.n_experts))
    return lambda _: weights
