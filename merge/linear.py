"""Linear: the weighted mean of the experts ("model soup").

Wortsman et al., https://arxiv.org/abs/2203.05482, section 2, here on task vectors: with weights
that sum to 1 the two forms are the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

from experthub.merge._merges import merges
from experthub.merge._task_vector import TaskVector, combine
from torch import Tensor


@merges.register(paper="https://arxiv.org/abs/2203.05482")
def linear(vectors: Sequence[TaskVector], weights: Tensor) -> TaskVector:
    """Weighted mean of task vectors, `sum_e w_e tau_e / sum_e w_e`.

    Raises ValueError when the weights sum to zero.
    """
    if abs(float(weights.sum())) < 1e-8:
        raise ValueError(f"expected weights with a sum other than 0, found {weights.tolist()}")
    return combine(vectors, weights / weights.sum())
