"""CMA-ES as the black-box optimiser that merges may ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from experthub.hub.errors import HubError


def minimize(
    loss: Callable[[Sequence[float]], float],
    start: Sequence[float],
    bound: float,
    evaluations: int,
    seed: int,
) -> list[float]:
    """Search for the point of least loss with CMA-ES (Hansen, https://arxiv.org/abs/1604.00772).

    Args:
        loss: The function to minimise.
        start: The first point.
        bound: The largest absolute value of a coordinate.
        evaluations: The largest number of evaluations of the loss, at least 1.
        seed: The seed of the search.

    Returns:
        The best point that was evaluated.

    Raises:
        HubError: The package cmaes is not installed.
    """
    import numpy

    try:
        from cmaes import CMA  # type: ignore[import-untyped]
    except ImportError:
        raise HubError(
            "the package cmaes is not installed", "run pip install 'experthub[lorahub]'"
        ) from None
    if len(start) == 1:
        return _search_line(loss, bound, evaluations)
    limits = numpy.array([[-bound, bound]] * len(start))
    search = CMA(mean=numpy.array(start), sigma=bound / 3, bounds=limits, seed=seed % 2**32)
    best, least = list(start), loss(start)
    told: list[tuple[Any, float]] = []
    for _ in range(evaluations - 1):
        point = search.ask()
        value = loss(point.tolist())
        if value < least:
            best, least = point.tolist(), value
        told.append((point, value))
        if len(told) == search.population_size:
            search.tell(told)
            told = []
    return best


def _search_line(
    loss: Callable[[Sequence[float]], float], bound: float, evaluations: int
) -> list[float]:
    """Evaluate a grid that includes zero, because CMA-ES needs at least two dimensions."""
    points = torch.linspace(-bound, bound, max(evaluations - 1, 0)).tolist()
    return min(([x] for x in [0.0, *points]), key=loss)
