"""LoraHub: one weight per LoRA, found on a few examples of a new task.

Huang et al., https://arxiv.org/abs/2307.13269, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from experthub.merge._attached import Attached
from experthub.merge._catalogue import Range
from experthub.merge._coefficients import Coefficients, Combine, composed
from experthub.merge._fit import Fit, initial, learn
from experthub.merge._learner import Data, Learner
from experthub.merge._methods import merges
from experthub.merge._objectives import cross_entropy
from experthub.merge._task_vector import TaskVector, weighted
from torch import Tensor


@merges.register(
    paper="https://arxiv.org/abs/2307.13269",
    needs=("data",),
    order_dependent=True,
    learns=True,
    labelled=lambda options: True,
)
def lorahub(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    learner: Learner,
    *,
    combine: Combine = "parameters",
    optimizer: Literal["cma_es", "adam"] = "cma_es",
    steps: Annotated[int, Range(1)] = 40,
    bound: Annotated[float, Range(0.01, 100)] = 1.5,
    l1: Annotated[float, Range(0, 100)] = 0.05,
    lr: Annotated[float, Range(1e-8, 10)] = 0.1,
    seed: int = 0,
) -> TaskVector:
    """One weight per expert, found without gradients on a few labelled examples.

    combine: `parameters` sums the factors, `(sum w s B)(sum w A)`, as the paper does, which needs
    LoRAs of one rank; `outputs` sums the changes themselves.
    optimizer: `cma_es`, or `adam`, which needs one backward pass a step.  The paper uses
    nevergrad's NGOpt, which chooses among CMA-ES and its kin.
    steps: evaluations of the loss, or steps of Adam.
    bound: of a weight's absolute value.
    l1: factor of the mean absolute weight that is added to the loss.
    lr: learning rate of Adam.
    seed: of the search.
    """
    given = weighted(vectors, weights)
    fit = Fit(
        objective="cross_entropy",
        granularity="task",
        start=0.0,
        steps=steps,
        lr=lr,
        batch_size=max(learner.data.sizes) if learner.data else 1,
        constraint="project",
        bounds=(-bound, bound),
        l1=l1,
        combine=combine,
        seed=seed,
    )
    if learner.stored is not None or optimizer == "adam":
        return composed(given, learn(given, learner, fit))
    return composed(given, _searched(given, learner, fit))


def _searched(vectors: Sequence[TaskVector], learner: Learner, fit: Fit) -> Coefficients:
    """The best weights that a black-box optimiser finds."""
    data, start = learner.given, initial(vectors, fit)
    if data.labels is None or learner.minimise is None:
        raise ValueError("expected labels and an optimiser to search with, found none")
    history: list[float] = []
    # The search asks for the same points again where it gets the same answers.
    known = (learner.load() or {}).get("history", torch.empty(0)).tolist()
    with torch.no_grad(), Attached(data.model, vectors, start) as attached:

        def loss(point: Sequence[float]) -> float:
            if len(history) < len(known):
                history.append(known[len(history)])
                return history[-1]
            values = torch.tensor(point, dtype=torch.float64)[:, None]
            attached.set(values)
            found = _mean_loss(data) + fit.l1 * float(values.abs().mean())
            history.append(found)
            learner.save({"history": torch.tensor(history, dtype=torch.float64)})
            learner.report(f"searching weights, loss {found:.4f}", len(history), fit.steps)
            return found

        best = learner.minimise(loss, [0.0] * len(vectors), fit.bounds[1], fit.steps, fit.seed)
    values = torch.tensor(list(best), dtype=torch.float64)[:, None]
    return replace(start, values=values, history=tuple(history))


def _mean_loss(data: Data) -> float:
    """The mean over tasks of the cross-entropy of all of their examples."""
    logits = data.logits([torch.arange(n) for n in data.sizes])
    pairs = zip(logits, data.labels or (), strict=True)
    return sum(float(cross_entropy(found, labels)) for found, labels in pairs) / len(data.sizes)
