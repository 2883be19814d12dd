"""Linear: the weighted mean of the experts ("model soup").

Wortsman et al., https://arxiv.org/abs/2203.05482, section 2. The paper averages parameters, and this
method averages task vectors; the results are equal because the weights are divided by their sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from experthub.merge._merges import merges
from experthub.merge._task_vector import TaskVector, combine, normalize_weights
from torch import Tensor


@merges.register(paper="https://arxiv.org/abs/2203.05482")
def linear(vectors: Sequence[TaskVector], weights: Tensor) -> TaskVector:
    """Average task vectors with weights: `sum_e w_e tau_e / sum_e w_e`.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`.

    Returns:
        The merged task vector; low-rank if all experts are.

    Raises:
        ValueError: The weights sum to zero, the bases differ, the number of weights is not the
            number of vectors, or a weight is not finite.
    """
    return combine(vectors, normalize_weights(weights))
