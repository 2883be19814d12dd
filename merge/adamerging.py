"""AdaMerging: coefficients that make the merged model's predictions sure, without labels.

Yang et al., https://arxiv.org/abs/2310.02575, sections 3.2 (task-wise, layer-wise) and 3.3 (++).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from experthub.merge._catalogue import Range
from experthub.merge._coefficients import composed
from experthub.merge._fit import Constraint, Fit, learn
from experthub.merge._learner import Learner
from experthub.merge._methods import merges
from experthub.merge._task_vector import TaskVector, weighted
from experthub.merge.ties import agreeing, trimmed
from torch import Tensor


@merges.register(paper="https://arxiv.org/abs/2310.02575", needs=("data",), learns=True)
def adamerging(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    learner: Learner,
    *,
    granularity: str = "layer",
    plus_plus: bool = False,
    density: Annotated[float, Range(0.0001, 1)] = 0.2,
    objective: Literal["entropy", "marginal_entropy"] = "entropy",
    constraint: Constraint = "project",
    init: Annotated[float, Range(0, 1)] = 0.3,
    steps: Annotated[int, Range(1)] = 500,
    lr: Annotated[float, Range(1e-8, 10)] = 1e-3,
    batch_size: Annotated[int, Range(1)] = 16,
    views: Annotated[int, Range(2)] = 4,
    halves: bool = False,
    seed: int = 0,
) -> TaskVector:
    """Sum of task vectors with coefficients learned by minimising entropy on unlabelled inputs.

    granularity: what shares a coefficient: `task`, `layer` (a parameter tensor, as in the paper),
    `block` (a transformer layer), or a regular expression on parameter names.
    plus_plus: use the task vectors of TIES: trimmed, and without what disagrees in sign.
    density: with plus_plus, the share of entries that are kept.
    objective: entropy, or that of the prediction averaged over `views` variations of an input.
    constraint: how coefficients stay in 0..1: moved back after a step (`project`), clamped where
    used as in the authors' code, which holds what has left that range there (`clamp`), or `none`.
    init: the first value of every coefficient.
    steps: of Adam.
    lr: learning rate of Adam.
    batch_size: inputs per task and step.
    views: variations of an input, for marginal_entropy.
    halves: keep dense task vectors as bfloat16 while learning, in half the memory.
    seed: of the order of inputs.
    """
    given = weighted(vectors, weights)
    if plus_plus:
        given = agreeing(trimmed(given, density, "model"))
    fit = Fit(
        objective=objective,
        granularity=granularity,
        start=init,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        constraint=constraint,
        views=views,
        halves=halves,
        seed=seed,
    )
    return composed(given, learn(given, learner, fit))
