"""LoraHub: one weight per LoRA, found on a few examples of a new task.

Huang et al., https://arxiv.org/abs/2307.13269, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from experthub.merge._attached_experts import AttachedExperts
from experthub.merge._catalogue import Options
from experthub.merge._coefficients import Coefficients, Combine, compose_vector
from experthub.merge._fit_settings import Fit
from experthub.merge._fitting import learn_coefficients, make_start_coefficients
from experthub.merge._materials import Data, MergeMaterials
from experthub.merge._merges import merges
from experthub.merge._objectives import cross_entropy
from experthub.merge._options import Range, RecipeSeed, ShapesState
from experthub.merge._task_vector import TaskVector, scale_vectors
from torch import Tensor


def _learn(materials: MergeMaterials, options: Options) -> Coefficients:
    """Find one weight per expert, by a black-box search or by Adam."""
    bound = options["bound"]
    fit = Fit(
        objective="cross_entropy",
        granularity="task",
        start=0.0,
        steps=options["steps"],
        lr=options["lr"],
        batch_size=max(materials.given_data.sizes),
        constraint="project",
        bounds=(-bound, bound),
        l1=options["l1"],
        combine=options["combine"],
        seed=options["seed"],
    )
    vectors = scale_vectors(materials.vectors, materials.weights)
    given = replace(materials, vectors=vectors)
    return learn_coefficients(given, fit) if options["optimizer"] == "adam" else _search(given, fit)


def _search(materials: MergeMaterials, fit: Fit) -> Coefficients:
    """Find the best weights with the black-box optimiser."""
    data, start = materials.given_data, make_start_coefficients(materials.vectors, fit)
    if data.labels is None or materials.minimize is None:
        raise ValueError("expected labels and an optimiser to search with, found none")
    history: list[float] = []
    # Given the same losses, the search asks for the same points, so saved losses replay an
    # interrupted run.
    known = (materials.load() or {}).get("history", torch.empty(0)).tolist()
    with torch.no_grad(), AttachedExperts(data.model, materials.vectors, start) as attached:

        def loss(point: Sequence[float]) -> float:
            if len(history) < len(known):
                history.append(known[len(history)])
                return history[-1]
            values = torch.tensor(point, dtype=torch.float64)[:, None]
            attached.set(values)
            found = _mean_loss(data) + fit.l1 * float(values.abs().mean())
            history.append(found)
            materials.save({"history": torch.tensor(history, dtype=torch.float64)})
            materials.report(f"searching weights, loss {found:.4f}", len(history), fit.steps)
            return found

        zeros = [0.0] * len(materials.vectors)
        best = materials.minimize(loss, zeros, fit.bounds[1], fit.steps, fit.seed)
    values = torch.tensor(list(best), dtype=torch.float64)[:, None]
    return replace(start, values=values, history=tuple(history))


def _mean_loss(data: Data) -> float:
    """Compute the cross-entropy of all examples of each task, averaged over the tasks."""
    logits = data.logits([torch.arange(n) for n in data.sizes])
    pairs = zip(logits, data.labels or (), strict=True)
    return sum(float(cross_entropy(found, labels)) for found, labels in pairs) / len(data.sizes)


@merges.register(
    paper="https://arxiv.org/abs/2307.13269",
    needs=("data",),
    prepare=_learn,
    needs_labels=lambda options: True,
    order_dependent=True,
)
def lorahub(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    coefficients: Coefficients,
    *,
    combine: Annotated[Combine, ShapesState] = "parameters",
    optimizer: Literal["cma_es", "adam"] = "cma_es",
    steps: Annotated[int, Range(1)] = 40,
    bound: Annotated[float, Range(0.01, 100)] = 1.5,
    l1: Annotated[float, Range(0, 100)] = 0.05,
    lr: Annotated[float, Range(1e-8, 10)] = 0.1,
    seed: Annotated[int, RecipeSeed] = 0,
) -> TaskVector:
    """Sum experts with one weight each, found without gradients on a few labelled examples.

    Args:
        vectors: The task vectors of the experts.
        weights: The experts' weights `[E]`; they multiply the task vectors before the search.
        coefficients: The weights that the search found.
        combine: `parameters` sums the factors, `(sum w s B)(sum w A)`, as the paper does; this needs
            LoRAs of one rank. `outputs` sums the changes themselves.
        optimizer: The search method: `cma_es`, or `adam`, which needs one backward pass per step. The
            paper uses NGOpt of nevergrad, which chooses among CMA-ES and similar methods.
        steps: Evaluations of the loss, or steps of Adam.
        bound: The largest absolute value of a weight.
        l1: The factor of the mean absolute weight that is added to the loss.
        lr: The learning rate of Adam.
        seed: The seed of the search.

    Returns:
        The merged task vector; low-rank where all experts are.
    """
    return compose_vector(scale_vectors(vectors, weights), coefficients)
