"""DARE: drop entries of each task vector at random, rescale the others, and sum.

Yu et al., https://arxiv.org/abs/2311.03099, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from experthub.merge._coefficients import make_generator
from experthub.merge._delta import Delta, Dense
from experthub.merge._merges import merges
from experthub.merge._options import Range, RecipeSeed
from experthub.merge._task_vector import TaskVector, combine
from torch import Tensor


@merges.register(paper="https://arxiv.org/abs/2311.03099", dense=True)
def dare(
    vectors: Sequence[TaskVector],
    weights: Tensor,
    *,
    density: Annotated[float, Range(0.0001, 1)] = 0.1,
    scale: Annotated[float, Range(-10, 10)] = 0.3,
    rescale: Literal["inverse_density", "l1", "none"] = "inverse_density",
    seed: Annotated[int, Range(0), RecipeSeed] = 0,
) -> TaskVector:
    """Scaled sum of randomly thinned task vectors, `scale * sum_e w_e m_e tau_e / density`.

    A mask `m_e` is drawn from the seed, the expert's content and the parameter's name: the order of
    the experts does not matter, and an expert that stands twice is thinned alike.

    density: chance of an entry to be kept.  scale: factor of the whole sum.  rescale: what is kept
    is divided by the density, as in the paper, or brought to the L1 norm that the tensor had, or
    left as it is.  seed: another one draws other masks.
    """
    if density < 1:
        vectors = [_dropped(vector, density, rescale, seed) for vector in vectors]
    return combine(vectors, weights * scale)


def _dropped(vector: TaskVector, density: float, rescale: str, seed: int) -> TaskVector:
    def at(name: str) -> Delta:
        d = vector[name].dense()
        kept = torch.where(_mask(d, density, f"{seed}\n{vector.seed}\n{name}"), d, 0)
        return Dense(kept * _factor(d, kept, density, rescale))

    return TaskVector(vector.base, {name: partial(at, name) for name in vector}, vector.seed)


def _mask(like: Tensor, density: float, key: str) -> Tensor:
    """True with the chance `density`, drawn from a text; on the CPU, so that all devices get the same."""
    random = make_generator("dare", key)
    return (torch.rand(like.shape, generator=random) < density).to(like.device)


def _factor(before: Tensor, kept: Tensor, density: float, rescale: str) -> float:
    if rescale == "none":
        return 1.0
    if rescale == "inverse_density":
        return 1 / density
    # Of a tensor that lost everything nothing can be rescaled.
    norm = float(kept.abs().sum(dtype=torch.float64))
    return float(before.abs().sum(dtype=torch.float64)) / norm if norm else 1.0
