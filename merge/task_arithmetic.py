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
    """Scaled sum of task vectors, `scale * sum_e w_e tau_e`.

    scale: factor of the whole sum; 0.3 is the papers' choice for eight experts, a negative one
    makes the model forget.
    """
    return combine(vectors, weights * scale)
