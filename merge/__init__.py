"""Exact algebra of weight changes, and the merges built on it; imports torch only."""

from experthub.merge._catalogue import Catalogue, Option, Range, Strategy
from experthub.merge._delta import Delta, Dense, LowRank, total, truncated
from experthub.merge._methods import merges
from experthub.merge._task_vector import TaskVector, combine, tensorwise
from experthub.merge.dare import dare
from experthub.merge.linear import linear
from experthub.merge.task_arithmetic import task_arithmetic
from experthub.merge.ties import ties

__all__ = [
    "Catalogue",
    "Delta",
    "Dense",
    "LowRank",
    "Option",
    "Range",
    "Strategy",
    "TaskVector",
    "combine",
    "dare",
    "linear",
    "merges",
    "task_arithmetic",
    "tensorwise",
    "ties",
    "total",
    "truncated",
]
