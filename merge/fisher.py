"""Fisher merging: a mean of the experts in which every entry has its own precision as weight.

Matena and Raffel, https://arxiv.org/abs/2111.09832, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from experthub.merge._attached import Attached
from experthub.merge._catalogue import Range
from experthub.merge._coefficients import seeded
from experthub.merge._delta import Dense
from experthub.merge._learner import Data, Learner, logits_of
from experthub.merge._methods import merges
from experthub.merge._objectives import log_probabilities
from experthub.merge._task_vector import TaskVector, base_of, united
from experthub.merge.regmean import one_block, paired
from torch import Tensor


@merges.register(
    paper="https://arxiv.org/abs/2111.09832", needs=("data",), order_dependent=True, dense=True
)
def fisher(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    learner: Learner,
    *,
    floor: Annotated[float, Range(1e-30, 1)] = 1e-6,
    seed: int = 0,
) -> TaskVector:
    """Mean of experts weighted by the diagonal of each one's Fisher information.

    `tau = sum_e w_e F_e tau_e / sum_e w_e F_e`, entry by entry; `F_e` is the mean over the data of
    the expert's own task of the squared gradient of the log-probability of an answer drawn from
    the expert's predictions: `data.tasks` has one for each expert, in their order.  Labels are
    not used.

    floor: the least value of F; below it the experts count alike.
    seed: of the answers drawn.
    """
    data = paired(learner, vectors)
    sums: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        squares = gradient.square()
        sums[name] = sums[name] + squares if name in sums else squares

    found: list[dict[str, Tensor]] = []
    with Attached(data.model, vectors, one_block(len(vectors)), take=take) as attached:
        for e in range(len(vectors)):
            attached.set(torch.eye(len(vectors), dtype=torch.float64)[e][:, None])
            sums = {}
            _differentiate(data, e, seed)
            found.append({name: total / data.sizes[e] for name, total in sums.items()})
            learner.report("estimating Fisher information", e + 1, len(vectors))
    return _precise_mean(vectors, weights, found, floor)


def _differentiate(data: Data, task: int, seed: int) -> None:
    """The gradient of a drawn answer's log-probability, for one input after the other."""
    draw = seeded("fisher", seed, task)
    for row in range(data.sizes[task]):
        log_1C = log_probabilities(logits_of(data, task, torch.tensor([row])))
        answer = torch.multinomial(log_1C.detach().exp(), 1, generator=draw)
        log_1C.gather(-1, answer).sum().backward()  # type: ignore[no-untyped-call]


def _precise_mean(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    information: Sequence[dict[str, Tensor]],
    floor: float,
) -> TaskVector:
    def at(name: str) -> Dense:
        shape = next(vector[name].shape for vector in vectors if name in vector)
        above, below = torch.zeros(shape), torch.zeros(shape)
        for vector, weight, found in zip(vectors, weights.tolist(), information, strict=True):
            precision = weight * found.get(name, torch.zeros(shape)).clamp(min=floor)
            below = below + precision
            if name in vector:
                above = above + precision * vector[name].dense()
        return Dense(above / below)

    return united(base_of(vectors), vectors, at)
