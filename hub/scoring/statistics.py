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


def bootstrap(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """95 % percentile interval of the mean of the groups' means, resampling within each group."""
    random = numpy.random.default_rng(seed)
    means = numpy.zeros(RESAMPLES)
    for group in groups:
        values = numpy.asarray(group, dtype=float)
        picks = random.integers(0, len(values), (RESAMPLES, len(values)))
        means += values[picks].mean(1) / len(groups)
    low, high = numpy.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]
