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
    """Drop entries of task vectors at random, and sum them: `scale * sum_e w_e m_e tau_e / density`.

    The mask `m_e` is drawn from the seed, the expert's content and the parameter's name. It does not
    depend on the order of the experts, and an expert that a recipe names twice has one mask.

    Args:
        vectors: The task vectors of E experts.
        weights: The experts' weights `[E]`.
        density: The probability that an entry is kept.
        scale: The factor of the whole sum.
        rescale: The rescaling of the kept entries. `inverse_density` divides them by the density, as
            in the paper. `l1` restores the L1 norm of the tensor. `none` leaves them unchanged.
        seed: The seed of the masks.

    Returns:
        The merged task vector; dense unless `density` is 1 and all experts are low-rank.

    Raises:
        ValueError: The bases differ, the number of weights is not the number of vectors, or a
            weight is not finite.
    """
    if density < 1:
        vectors = [_drop_entries(vector, density, rescale, seed) for vector in vectors]
    return combine(vectors, weights * scale)


def _drop_entries(vector: TaskVector, density: float, rescale: str, seed: int) -> TaskVector:
    """Set entries of a task vector to zero at random and rescale the others, lazily."""

    def compute_change(name: str) -> Delta:
        d = vector[name].dense()
        kept = torch.where(_draw_mask(d, density, f"{seed}\n{vector.seed}\n{name}"), d, 0)
        return Dense(kept * _compute_factor(d, kept, density, rescale))

    return TaskVector(
        vector.base, {name: partial(compute_change, name) for name in vector}, vector.seed
    )


def _draw_mask(like: Tensor, density: float, key: str) -> Tensor:
    """Draw a mask whose entries are true with a probability, on the CPU: the same for any device."""
    random = make_generator("dare", key)
    return (torch.rand(like.shape, generator=random) < density).to(like.device)


def _compute_factor(before: Tensor, kept: Tensor, density: float, rescale: str) -> float:
    """Compute the factor by which the kept entries of a tensor are multiplied."""
    if rescale == "none":
        return 1.0
    if rescale == "inverse_density":
        return 1 / density
    # A tensor without a kept entry has the norm 0, and no factor restores the old norm.
    norm = float(kept.abs().sum(dtype=torch.float64))
    return float(before.abs().sum(dtype=torch.float64)) / norm if norm else 1.0
