"""Exact algebra of weight changes, and the merges built on it; imports torch only."""

from experthub.merge._attached_experts import AttachedExperts, find_uses
from experthub.merge._catalogue import (
    Catalogue,
    ExpertOutline,
    MethodError,
    MethodFailure,
    Options,
    Outline,
    Strategy,
)
from experthub.merge._coefficients import (
    Coefficients,
    Combine,
    assign_blocks,
    compose_vector,
    make_generator,
)
from experthub.merge._delta import Delta, Dense, LowRank, sum_deltas, truncate
from experthub.merge._fit_settings import Fit
from experthub.merge._fitting import learn_coefficients
from experthub.merge._inner_products import cosine_matrix, gram_matrix, inner_product
from experthub.merge._linear_modules import is_linear, is_transposed, make_like, orient
from experthub.merge._materials import Data, MergeMaterials, Minimizer, Progress
from experthub.merge._merges import MergeTraits, merges
from experthub.merge._options import (
    EncoderName,
    ExamplesPerTask,
    InputsPerStep,
    LateOption,
    Option,
    Range,
    RecipeSeed,
    Role,
    ShapesExperts,
    ShapesState,
    TaskName,
)
from experthub.merge._plugin_error import PluginError
from experthub.merge._task_vector import (
    TaskVector,
    check_weights,
    combine,
    find_base,
    map_tensors,
    unite_vectors,
)
from experthub.merge._weight_reads import WeightRead, find_weight_reads
from experthub.merge.adamerging import adamerging
from experthub.merge.atlas import atlas
from experthub.merge.concatenate import concatenate
from experthub.merge.dare import dare
from experthub.merge.fisher import fisher
from experthub.merge.linear import linear
from experthub.merge.lorahub import lorahub
from experthub.merge.regmean import regmean
from experthub.merge.regmean_plusplus import regmean_plusplus
from experthub.merge.task_arithmetic import task_arithmetic
from experthub.merge.ties import ties

__all__ = [
    "AttachedExperts",
    "Catalogue",
    "Coefficients",
    "Combine",
    "Data",
    "Delta",
    "Dense",
    "EncoderName",
    "ExamplesPerTask",
    "ExpertOutline",
    "Fit",
    "InputsPerStep",
    "LateOption",
    "LowRank",
    "MergeMaterials",
    "MergeTraits",
    "MethodError",
    "MethodFailure",
    "Minimizer",
    "Option",
    "Options",
    "Outline",
    "PluginError",
    "Progress",
    "Range",
    "RecipeSeed",
    "Role",
    "ShapesExperts",
    "ShapesState",
    "Strategy",
    "TaskName",
    "TaskVector",
    "WeightRead",
    "adamerging",
    "assign_blocks",
    "atlas",
    "check_weights",
    "combine",
    "compose_vector",
    "concatenate",
    "cosine_matrix",
    "dare",
    "find_base",
    "find_uses",
    "find_weight_reads",
    "fisher",
    "gram_matrix",
    "inner_product",
    "is_linear",
    "is_transposed",
    "learn_coefficients",
    "linear",
    "lorahub",
    "make_generator",
    "make_like",
    "map_tensors",
    "merges",
    "orient",
    "regmean",
    "regmean_plusplus",
    "sum_deltas",
    "task_arithmetic",
    "ties",
    "truncate",
    "unite_vectors",
]
