"""Settings with which the coefficients of task vectors are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experthub.merge._coefficients import Combine

Objective = Literal["entropy", "marginal_entropy", "fixmatch", "cross_entropy", "negation"]
LABELLED = ("cross_entropy", "negation")  # The objectives that need labels.
Constraint = Literal["project", "clamp", "none"]


@dataclass(frozen=True)
class Fit:
    """The settings with which coefficients are learned.

    Args:
        objective: The loss. `negation` is the cross-entropy of the control tasks minus that of the
            tasks to forget; the others are in `_objectives`.
        granularity: The parameters that share a coefficient, as for `assign_blocks`.
        start: The first value of every coefficient.
        steps: The number of steps of the optimiser.
        lr: The learning rate.
        batch_size: Inputs per task and step.
        groups: The number of groups K into which the entries of every parameter are divided.
        l2: The weight decay of AdamW. 0 uses Adam.
        l1: The factor of the mean absolute coefficient that is added to the loss.
        cosine: Whether the learning rate falls to 0 along a cosine.
        constraint: The way in which coefficients are kept within `bounds`. `project` moves them back
            after each step. `clamp` clamps them where they are used; a coefficient outside has no
            gradient and stays outside. `none` sets no limits.
        bounds: The smallest and the largest value of a coefficient.
        patience: The number of evaluations without an improvement after which learning stops. The
            held-out inputs are evaluated about 20 times, and the best coefficients are kept. 0
            turns this off and keeps the last coefficients.
        views: Variations of an input for `marginal_entropy`.
        confidence: The probability from which `fixmatch` uses a prediction as a label.
        forget: The positions of the tasks that `negation` forgets.
        keep: The share of the base's accuracy on the held-out inputs of the control tasks that
            `negation` must keep; other coefficients do not count.
        combine: `outputs` sums changes and `parameters` sums factors, as in `Coefficients`.
        halves: Keep dense changes as bfloat16 while learning, in half the memory.
        seed: The seed of the order of inputs and of the groups.
    """

    objective: Objective
    granularity: str
    start: float
    steps: int
    lr: float
    batch_size: int
    groups: int = 1
    l2: float = 0.0
    l1: float = 0.0
    cosine: bool = False
    constraint: Constraint = "none"
    bounds: tuple[float, float] = (0.0, 1.0)
    patience: int = 0
    views: int = 4
    confidence: float = 0.99
    forget: tuple[int, ...] = ()
    keep: float = 0.95
    combine: Combine = "outputs"
    halves: bool = False
    seed: int = 0
