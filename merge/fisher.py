"""Fisher merging: a mean of the experts that weights each entry by its Fisher information.

Matena and Raffel, https://arxiv.org/abs/2111.09832, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from experthub.merge._attached_experts import AttachedExperts
from experthub.merge._catalogue import Options
from experthub.merge._coefficients import make_generator, make_zero_coefficients
from experthub.merge._delta import Dense
from experthub.merge._materials import Data, MergeMaterials, compute_logits
from experthub.merge._merges import merges
from experthub.merge._objectives import compute_log_probabilities
from experthub.merge._options import Range, RecipeSeed
from experthub.merge._task_vector import (
    TaskVector,
    check_weights,
    normalize_weights,
    unite_vectors,
)
from torch import Tensor

# Per expert: parameter name -> the diagonal of the Fisher information, in the parameter's shape.
Information = list[dict[str, Tensor]]


def _estimate(materials: MergeMaterials, options: Options) -> Information:
    """Estimate the diagonal of each expert's Fisher information on the data of its own task."""
    data, vectors = materials.paired_data, materials.vectors
    sums: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        squares = gradient.square()
        sums[name] = sums[name] + squares if name in sums else squares

    found: Information = []
    start = make_zero_coefficients(len(vectors))
    with AttachedExperts(data.model, vectors, start, take=take) as attached:
        for e in range(len(vectors)):
            attached.set(torch.eye(len(vectors), dtype=torch.float64)[e][:, None])
            sums = {}
            _differentiate(data, e, options["seed"])
            found.append({name: (total / data.sizes[e]).cpu() for name, total in sums.items()})
            materials.report("estimating Fisher information", e + 1, len(vectors))
    return found


def _differentiate(data: Data, task: int, seed: int) -> None:
    """Backpropagate the log-probability of a drawn answer, one input at a time."""
    draw = make_generator("fisher", seed, task)
    for row in range(data.sizes[task]):
        log_1C = compute_log_probabilities(compute_logits(data, task, torch.tensor([row])))
        # The generator is on the CPU, so that every device draws the same answers.
        answer = torch.multinomial(log_1C.detach().exp().cpu(), 1, generator=draw)
        log_1C.gather(-1, answer.to(log_1C.device)).sum().backward()  # type: ignore[no-untyped-call]


@merges.register(
    paper="https://arxiv.org/abs/2111.09832",
    needs=("data",),
    prepare=_estimate,
    keeps_state=False,
    order_dependent=True,
    dense=True,
)
def fisher(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    information: Information,
    *,
    floor: Annotated[float, Range(1e-30, 1)] = 1e-6,
    seed: Annotated[int, RecipeSeed] = 0,
) -> TaskVector:
    """Average the experts entry by entry, weighted by the diagonals of their Fisher information.

    A merged entry is `sum_e w_e F_e tau_e / sum_e w_e F_e`. `F_e` is the mean squared gradient of the
    log-probability of an answer that is drawn from the predictions of expert `e` on the data of its
    own task: `data.tasks` has one task for each expert, in their order. Labels are not used.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`.
        information: The diagonal of the Fisher information per expert and parameter.
        floor: The smallest value of F. Smaller values are replaced by it.
        seed: The seed of the answers that are drawn.

    Returns:
        The merged task vector, dense.

    Raises:
        ValueError: The weights sum to zero, the bases differ, the number of weights is not the
            number of vectors, or a weight is not finite.
    """
    base = check_weights(vectors, weights)
    normalize_weights(weights)  # It refuses weights that sum to zero.

    def compute_change(name: str) -> Dense:
        shape = next(vector[name].shape for vector in vectors if name in vector)
        above, below = torch.zeros(shape), torch.zeros(shape)
        for vector, weight, found in zip(vectors, weights.tolist(), information, strict=True):
            precision = weight * found.get(name, torch.zeros(shape)).clamp(min=floor)
            below = below + precision
            if name in vector:
                above = above + precision * vector[name].dense()
        return Dense(above / below)

    return unite_vectors(base, vectors, compute_change)
