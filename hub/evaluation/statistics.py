"""Intervals for scores, seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

RESAMPLES = 10_000
Interval = list[float]


def wilson(successes: float, n: int) -> Interval:
    """Wilson's 95 % interval of a share."""
    z, share = 1.959964, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """95 % percentile interval of a mean; of paired differences, the paired bootstrap."""
    return _percentiles(_means(numpy.asarray(values, float), _random(seed), resamples))


def hierarchical(
    groups: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """95 % percentile interval of the mean of the groups' means, for groups like these.

    Both levels are resampled: the groups with replacement, and each one's values anew every time
    that it is drawn.  With a single group it is `bootstrap`.
    """
    random, arrays = _random(seed), [numpy.asarray(group, float) for group in groups]
    total = numpy.zeros(resamples)
    for _ in arrays:
        drawn = random.integers(0, len(arrays), resamples)
        for index, values in enumerate(arrays):
            here = numpy.flatnonzero(drawn == index)
            total[here] += _means(values, random, len(here))
    return _percentiles(total / len(arrays))


def _random(seed: int) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


def _means(
    values: numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]],
    random: numpy.random.Generator,
    resamples: int,
) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]:
    """Means of samples with replacement, a thousand at a time for the memory's sake."""
    parts = [
        values[random.integers(0, len(values), (min(1000, resamples - at), len(values)))].mean(1)
        for at in range(0, resamples, 1000)
    ]
    return numpy.concatenate(parts) if parts else numpy.zeros(0)


def _percentiles(means: numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]) -> Interval:
    low, high = numpy.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one side is constant."""
    a, b = (_mean_ranks(values) for values in (xs, ys))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else None


def kendall(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Kendall's rank correlation tau-b, which corrects for ties; None where one side is constant."""
    a, b = (numpy.sign(numpy.subtract.outer(v, v)) for v in map(numpy.asarray, (xs, ys)))
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else None


def _mean_ranks(values: Sequence[float]) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]:
    array = numpy.asarray(values, float)
    below = (array[:, None] > array).sum(1)
    ranks: numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]] = (
        below + ((array[:, None] == array).sum(1) + 1) / 2
    )
    return ranks
