"""AdaMerging: coefficients that make the merged model's predictions certain, without labels.

Yang et al., https://arxiv.org/abs/2310.02575, sections 3.2 (task-wise, layer-wise) and 3.3 (++).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from experthub.merge._catalogue import Options
from experthub.merge._coefficients import Coefficients, check_granularity, compose_vector
from experthub.merge._fit_settings import Constraint, Fit
from experthub.merge._fitting import learn_coefficients
from experthub.merge._materials import MergeMaterials
from experthub.merge._merges import merges
from experthub.merge._options import InputsPerStep, Range, RecipeSeed, ShapesState
from experthub.merge._task_vector import TaskVector, scale_vectors
from experthub.merge.ties import keep_agreeing, trim
from torch import Tensor


def _learn(materials: MergeMaterials, options: Options) -> Coefficients:
    """Minimise the entropy of the merged model's predictions over the coefficients."""
    vectors = _select_entries(
        materials.vectors, materials.weights, options["plus_plus"], options["density"]
    )
    fit = Fit(
        objective=options["objective"],
        granularity=options["granularity"],
        start=options["init"],
        steps=options["steps"],
        lr=options["lr"],
        batch_size=options["batch_size"],
        constraint=options["constraint"],
        views=options["views"],
        halves=options["halves"],
        seed=options["seed"],
    )
    found = learn_coefficients(replace(materials, vectors=vectors), fit)
    return replace(found, objective=options["objective"])


def _select_entries(
    vectors: Sequence[TaskVector], weights: Tensor, plus_plus: bool, density: float
) -> list[TaskVector]:
    """Weight the task vectors; for AdaMerging++, trim them and remove entries that disagree."""
    scaled = scale_vectors(vectors, weights)
    return keep_agreeing(trim(scaled, density, "model")) if plus_plus else scaled


@merges.register(
    paper="https://arxiv.org/abs/2310.02575",
    needs=("data",),
    prepare=_learn,
    check=check_granularity,
)
def adamerging(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    coefficients: Coefficients,
    *,
    granularity: Annotated[str, ShapesState] = "layer",
    plus_plus: Annotated[bool, ShapesState] = False,
    density: Annotated[float, Range(0.0001, 1), ShapesState] = 0.2,
    objective: Literal["entropy", "marginal_entropy"] = "entropy",
    constraint: Constraint = "project",
    init: Annotated[float, Range(0, 1)] = 0.3,
    steps: Annotated[int, Range(1)] = 500,
    lr: Annotated[float, Range(1e-8, 10)] = 1e-3,
    batch_size: Annotated[int, Range(1), InputsPerStep] = 16,
    views: Annotated[int, Range(2)] = 4,
    halves: bool = False,
    seed: Annotated[int, RecipeSeed] = 0,
) -> TaskVector:
    """Sum task vectors with coefficients learned by minimising entropy on unlabelled inputs.

    Args:
        vectors: The task vectors of the experts.
        weights: The experts' weights `[E]`; they multiply the task vectors before learning.
        coefficients: The learned coefficients.
        granularity: The parameters that share a coefficient: `task`, `layer` (a parameter tensor, as
            in the paper), `block` (a transformer layer), or a regular expression on parameter names.
        plus_plus: Use the task vectors of TIES: trimmed, and without entries that disagree in sign.
        density: The share of entries that `plus_plus` keeps.
        objective: The entropy of a prediction, or the entropy of the prediction averaged over
            `views` random variations of an input.
        constraint: The way in which coefficients are kept between 0 and 1. `project` moves them back
            after a step. `clamp` clamps them where they are used, as in the authors' code: a
            coefficient that has left the range has no gradient and stays outside. `none` sets no
            limits.
        init: The first value of every coefficient.
        steps: Steps of Adam.
        lr: The learning rate of Adam.
        batch_size: Inputs per task and step.
        views: Variations of an input for `marginal_entropy`.
        halves: Keep dense task vectors as bfloat16 while learning, in half the memory.
        seed: The seed of the order of inputs.

    Returns:
        The merged task vector; low-rank where all experts are, unless `plus_plus` is set.
    """
    return compose_vector(_select_entries(vectors, weights, plus_plus, density), coefficients)
