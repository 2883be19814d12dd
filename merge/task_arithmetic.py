"""Task arithmetic: a scaled sum of task vectors.

Ilharco et al., https://arxiv.org/abs/2212.04089, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from experthub.merge._merges import merges
from experthub.merge._options import Range
from experthub.merge._task_vector import TaskVector, combine
from torch import Tensor


@merges.register(paper="https://arxiv.org/abs/2212.04089")
def task_arithmetic(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    *,
    scale: Annotated[float, Range(-10, 10)] = 0.3,
) -> TaskVector:
    """Sum task vectors and scale the sum: `scale * sum_e w_e tau_e`.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`.
        scale: The factor of the whole sum. Papers use 0.3 for eight experts. A negative factor makes
            the model forget the experts' tasks.

    Returns:
        The merged task vector; low-rank if all experts are.

    Raises:
        ValueError: The bases differ, the number of weights is not the number of vectors, or a
            weight is not finite.
    """
    return combine(vectors, weights * scale)
