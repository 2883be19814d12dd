"""Confidence intervals and rank correlations of scores; every bootstrap is seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

RESAMPLES = 10_000
Interval = list[float]


def wilson_interval(successes: float, n: int) -> Interval:
    """Compute Wilson's 95 % interval of a proportion.

    Args:
        successes: The number of successes, from 0 to `n`.
        n: The number of trials, at least 1.

    Returns:
        The lower and the upper end, from 0 to 1.
    """
    z, share = 1.959964, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Compute the 95 % percentile bootstrap interval of a mean.

    For differences of pairs, this is the paired bootstrap.

    Args:
        values: The values, at least one.
        seed: The seed of the resampling.
        resamples: The number of resamples.

    Returns:
        The lower and the upper end.
    """
    return _take_percentiles(
        _resample_means(numpy.asarray(values, float), _create_generator(seed), resamples)
    )


def bootstrap_groups(
    groups: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Compute the 95 % hierarchical bootstrap interval of the mean of the groups' means.

    Both levels are resampled with replacement: the groups, and the values of a group each time that
    the group is drawn. The interval therefore covers other groups of the same kind. For a single
    group it is the interval of `bootstrap`.

    Args:
        groups: The values of each group, at least one per group.
        seed: The seed of the resampling.
        resamples: The number of resamples.

    Returns:
        The lower and the upper end.
    """
    random = _create_generator(seed)
    arrays = [numpy.asarray(group, float) for group in groups]
    total = numpy.zeros(resamples)
    for _ in arrays:
        drawn = random.integers(0, len(arrays), resamples)
        for index, values in enumerate(arrays):
            here = numpy.flatnonzero(drawn == index)
            total[here] += _resample_means(values, random, len(here))
    return _take_percentiles(total / len(arrays))


def _create_generator(seed: int) -> numpy.random.Generator:
    """Create a seeded random generator."""
    return numpy.random.default_rng(seed)


def _resample_means(
    values: numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]],
    random: numpy.random.Generator,
    resamples: int,
) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]:
    """Compute means of samples with replacement, 1000 samples at a time to save memory."""
    parts = [
        values[random.integers(0, len(values), (min(1000, resamples - at), len(values)))].mean(1)
        for at in range(0, resamples, 1000)
    ]
    return numpy.concatenate(parts) if parts else numpy.zeros(0)


def _take_percentiles(means: numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]) -> Interval:
    """Take the 2.5 % and the 97.5 % percentile of resampled means."""
    low, high = numpy.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Compute Spearman's rank correlation; tied values share their mean rank.

    Args:
        xs: The values of one side.
        ys: The values of the other side, in the same order.

    Returns:
        The correlation, from -1 to 1; None if one side is constant.
    """
    a, b = (_rank(values) for values in (xs, ys))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else None


def kendall(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Compute Kendall's rank correlation tau-b, which corrects for ties.

    Args:
        xs: The values of one side.
        ys: The values of the other side, in the same order.

    Returns:
        The correlation, from -1 to 1; None if one side is constant.
    """
    a, b = (numpy.sign(numpy.subtract.outer(v, v)) for v in map(numpy.asarray, (xs, ys)))
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else None


def _rank(values: Sequence[float]) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]:
    """Rank values from 1, the smallest first; tied values share their mean rank."""
    array = numpy.asarray(values, float)
    below = (array[:, None] > array).sum(1)
    ranks: numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]] = (
        below + ((array[:, None] == array).sum(1) + 1) / 2
    )
    return ranks
