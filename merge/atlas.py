"""aTLAS: anisotropic scaling of task vectors, learned from few labels or from none.

Zhang et al., https://arxiv.org/abs/2407.02880: coefficients per parameter tensor (section 3), task
negation and addition (4), few-shot recognition and test-time adaptation (5), and parameters split
into K groups (aTLAS x K, 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from experthub.merge._catalogue import Range
from experthub.merge._coefficients import composed
from experthub.merge._fit import Fit, Objective, learn
from experthub.merge._learner import Learner
from experthub.merge._methods import merges
from experthub.merge._task_vector import TaskVector, weighted
from torch import Tensor

Setting = Literal["few_shot", "task_addition", "negation", "test_time"]
DEFAULTS: dict[str, tuple[Objective, int, float]] = {  # objective, steps, lr
    "few_shot": ("cross_entropy", 100, 1e-1),
    "task_addition": ("cross_entropy", 300, 1e-2),
    "negation": ("negation", 100, 1e-2),
    "test_time": ("fixmatch", 100, 1e-2),
}


@merges.register(
    paper="https://arxiv.org/abs/2407.02880",
    needs=("data",),
    learns=True,
    labelled=lambda options: options["setting"] != "test_time",
)
def atlas(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    learner: Learner,
    *,
    setting: Setting = "few_shot",
    granularity: str = "layer",
    groups: Annotated[int, Range(2, 256)] = 4,
    forget: str | None = None,
    steps: Annotated[int | None, Range(1)] = None,
    lr: Annotated[float | None, Range(1e-8, 10)] = None,
    weight_decay: Annotated[float, Range(0, 10)] = 0.1,
    batch_size: Annotated[int, Range(1)] = 128,
    patience: Annotated[int, Range(0)] = 5,
    confidence: Annotated[float, Range(0, 1)] = 0.99,
    keep: Annotated[float, Range(0, 1)] = 0.95,
    halves: bool = False,
    seed: int = 0,
) -> TaskVector:
    """Sum of task vectors with a learned coefficient of any sign for each parameter tensor.

    setting: `few_shot` and `task_addition` minimise the cross-entropy of labelled examples,
    `negation` that of the control tasks minus that of the task to forget, `test_time` the loss of
    FixMatch on unlabelled inputs.
    granularity: what shares a coefficient: `layer` (a parameter tensor, as in the paper), `task`,
    `block`, a regular expression on parameter names, or `partition`: each parameter's entries in
    random groups with a coefficient each (aTLAS x K).
    groups: K, for `partition`.
    forget: with negation, the one of the data's tasks that is to be forgotten; the first by
    default.
    steps: of AdamW; 100, for task_addition 300.
    lr: its learning rate at the start of a cosine to zero; 0.1 for few_shot, 0.01 elsewhere.
    weight_decay: of AdamW, as in the paper.
    batch_size: inputs per task and step.
    patience: looks at held-out labelled examples (twenty in all) without a better loss before it
    stops; the best coefficients are kept; 0 takes the last ones and looks at none.
    keep: with negation, the share of the base's accuracy on the control tasks' held-out examples
    below which coefficients do not count.
    confidence: with test_time, the probability from which an own prediction counts.
    halves: keep dense task vectors as bfloat16 while learning, in half the memory.
    seed: of the order of inputs and of the groups.
    """
    given = weighted(vectors, weights)
    objective, default_steps, default_lr = DEFAULTS[setting]
    fit = Fit(
        objective=objective,
        granularity=granularity,
        start=0.0,
        steps=steps or default_steps,
        lr=lr or default_lr,
        batch_size=batch_size,
        groups=groups if granularity == "partition" else 1,
        l2=weight_decay,
        cosine=True,
        patience=patience,
        confidence=confidence,
        keep=keep,
        forget=_forgotten(learner, forget) if setting == "negation" else (),
        halves=halves,
        seed=seed,
    )
    return composed(given, learn(given, learner, fit))


def _forgotten(learner: Learner, name: str | None) -> tuple[int, ...]:
    if learner.stored is not None:
        return ()
    tasks = list(learner.given.tasks)
    if len(tasks) < 2:
        raise ValueError("expected a task to forget and a control task, found fewer")
    if name is not None and name not in tasks:
        raise ValueError(f"option 'forget': expected one of {', '.join(tasks)}, found {name!r}")
    return (tasks.index(name) if name else 0,)
