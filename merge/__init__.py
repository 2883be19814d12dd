"""Exact algebra of weight changes, and the merges built on it; imports torch only."""

from experthub.merge._attached import Attached, uses
from experthub.merge._catalogue import Catalogue, Combine, Option, Range, Routing, Strategy
from experthub.merge._coefficients import Coefficients, blocks_of, composed
from experthub.merge._delta import Delta, Dense, LowRank, total, truncated
from experthub.merge._fit import Fit, learn
from experthub.merge._inner import cosines, gram, inner
from experthub.merge._learner import Data, Learner
from experthub.merge._methods import merges
from experthub.merge._task_vector import TaskVector, combine, tensorwise
from experthub.merge.adamerging import adamerging
from experthub.merge.atlas import atlas
from experthub.merge.dare import dare
from experthub.merge.fisher import fisher
from experthub.merge.linear import linear
from experthub.merge.lorahub import lorahub
from experthub.merge.regmean import regmean
from experthub.merge.regmean_plusplus import regmean_plusplus
from experthub.merge.task_arithmetic import task_arithmetic
from experthub.merge.ties import ties

__all__ = [
    "Attached",
    "Catalogue",
    "Coefficients",
    "Combine",
    "Data",
    "Delta",
    "Dense",
    "Fit",
    "Learner",
    "LowRank",
    "Option",
    "Range",
    "Routing",
    "Strategy",
    "TaskVector",
    "adamerging",
    "atlas",
    "blocks_of",
    "combine",
    "composed",
    "cosines",
    "dare",
    "fisher",
    "gram",
    "inner",
    "learn",
    "linear",
    "lorahub",
    "merges",
    "regmean",
    "regmean_plusplus",
    "task_arithmetic",
    "tensorwise",
    "ties",
    "total",
    "truncated",
    "uses",
]
