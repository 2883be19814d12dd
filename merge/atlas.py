"""aTLAS: anisotropic scaling of task vectors, learned from few labels or from none.

Zhang et al., https://arxiv.org/abs/2407.02880: coefficients per parameter tensor (section 3), task
negation and addition (section 4), few-shot recognition and test-time adaptation (section 5), and
parameters split into K groups (aTLAS x K, section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from experthub.merge._catalogue import MethodError, Options
from experthub.merge._coefficients import Coefficients, check_granularity, compose_vector
from experthub.merge._fit_settings import Fit, Objective
from experthub.merge._fitting import learn_coefficients
from experthub.merge._materials import MergeMaterials
from experthub.merge._merges import merges
from experthub.merge._options import InputsPerStep, Range, RecipeSeed, ShapesState
from experthub.merge._task_vector import TaskVector, scale_vectors
from torch import Tensor

Setting = Literal["few_shot", "task_addition", "negation", "test_time"]
DEFAULTS: dict[str, tuple[Objective, int, float]] = {  # objective, steps, lr
    "few_shot": ("cross_entropy", 100, 1e-1),
    "task_addition": ("cross_entropy", 300, 1e-2),
    "negation": ("negation", 100, 1e-2),
    "test_time": ("fixmatch", 100, 1e-2),
}


def _learn(materials: MergeMaterials, options: Options) -> Coefficients:
    """Minimise the objective of a setting over the coefficients."""
    setting = options["setting"]
    objective, steps, lr = DEFAULTS[setting]
    forget = _find_forgotten(materials, options["forget"]) if setting == "negation" else ()
    fit = Fit(
        objective=objective,
        granularity=options["granularity"],
        start=0.0,
        steps=options["steps"] or steps,
        lr=options["lr"] or lr,
        batch_size=options["batch_size"],
        groups=options["groups"] if options["granularity"] == "partition" else 1,
        l2=options["weight_decay"],
        cosine=True,
        patience=options["patience"],
        confidence=options["confidence"],
        keep=options["keep"],
        forget=forget,
        halves=options["halves"],
        seed=options["seed"],
    )
    vectors = scale_vectors(materials.vectors, materials.weights)
    found = learn_coefficients(replace(materials, vectors=vectors), fit)
    return replace(found, objective=setting)


def _find_forgotten(materials: MergeMaterials, name: str | None) -> tuple[int, ...]:
    """Find the task to forget among the tasks of the data: the named one, or the first."""
    tasks = list(materials.given_data.tasks)
    if len(tasks) < 2:
        raise MethodError(
            "setting: negation needs a task to forget and a control task, and data: names only one",
            "name both tasks under data:",
        )
    if name is not None and name not in tasks:
        raise MethodError(
            f"forget: the data has no task {name!r}", f"use one of {', '.join(tasks)}"
        )
    return (tasks.index(name) if name else 0,)


@merges.register(
    paper="https://arxiv.org/abs/2407.02880",
    needs=("data",),
    prepare=_learn,
    needs_labels=lambda options: options["setting"] != "test_time",
    check=check_granularity,
)
def atlas(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    coefficients: Coefficients,
    *,
    setting: Setting = "few_shot",
    granularity: Annotated[str, ShapesState] = "layer",
    groups: Annotated[int, Range(2, 256), ShapesState] = 4,
    forget: str | None = None,
    steps: Annotated[int | None, Range(1)] = None,
    lr: Annotated[float | None, Range(1e-8, 10)] = None,
    weight_decay: Annotated[float, Range(0, 10)] = 0.1,
    batch_size: Annotated[int, Range(1), InputsPerStep] = 128,
    patience: Annotated[int, Range(0)] = 5,
    confidence: Annotated[float, Range(0, 1)] = 0.99,
    keep: Annotated[float, Range(0, 1)] = 0.95,
    halves: bool = False,
    seed: Annotated[int, RecipeSeed] = 0,
) -> TaskVector:
    """Sum task vectors with a learned coefficient of any sign for each parameter tensor.

    Args:
        vectors: The task vectors of the experts.
        weights: The experts' weights `[E]`; they multiply the task vectors before learning.
        coefficients: The learned coefficients.
        setting: `few_shot` and `task_addition` minimise the cross-entropy of labelled examples.
            `negation` minimises the cross-entropy of the control tasks minus that of the task to
            forget. `test_time` minimises the loss of FixMatch on unlabelled inputs.
        granularity: The parameters that share a coefficient: `layer` (a parameter tensor, as in the
            paper), `task`, `block`, a regular expression on parameter names, or `partition`, which
            splits the entries of each parameter into random groups with one coefficient each
            (aTLAS x K).
        groups: The number of groups K for `partition`.
        forget: The task of the data that `negation` forgets; the first one by default.
        steps: Steps of AdamW; the default is 100, and 300 for `task_addition`.
        lr: The learning rate at the start of a cosine to zero; the default is 0.1 for `few_shot`
            and 0.01 elsewhere.
        weight_decay: The weight decay of AdamW, as in the paper.
        batch_size: Inputs per task and step.
        patience: The number of evaluations without an improvement after which learning stops. The
            held-out labelled examples are evaluated about 20 times, and the best coefficients are
            kept. 0 turns this off and keeps the last coefficients.
        confidence: The probability from which `test_time` uses a prediction as a label.
        keep: The share of the base's accuracy on the held-out examples of the control tasks that
            `negation` must keep; other coefficients do not count.
        halves: Keep dense task vectors as bfloat16 while learning, in half the memory.
        seed: The seed of the order of inputs and of the groups.

    Returns:
        The merged task vector; low-rank where all experts are, unless entries are in groups.
    """
    return compose_vector(scale_vectors(vectors, weights), coefficients)
