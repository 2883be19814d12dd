"""Input-dependent mixing of experts; imports torch and `experthub.merge`."""

from experthub.routing._context import VALUES, Context, ForwardPass, ForwardPasses, RowKey
from experthub.routing._expert_rows import ExpertRows
from experthub.routing._group import Group
from experthub.routing._model_router import ModelRouter
from experthub.routing._packed import PackedExperts, group_modules, pack_experts
from experthub.routing._pool import Batch, Embedder, Pool, RouterMaterials, Select, State
from experthub.routing._recording import record_routing
from experthub.routing._routed_linear import RoutedLinear, attach_experts
from experthub.routing._router import ExpertStack, Router, TopK, Weights, standardise, top_k_softmax
from experthub.routing._routers import RouterTraits, Routing, routers
from experthub.routing._skilled_linear import BatchTasks, SkilledLinear
from experthub.routing._skills import AVERAGE, MULTI_HEADED, SERVED_BY, Skills, check_heads
from experthub.routing._state import StateError, StateTensors, read_tensor
from experthub.routing.arrow import arrow, subtract_general
from experthub.routing.average_activation import average_activation
from experthub.routing.best_individual import best_individual
from experthub.routing.kernels.measure import describe_shape, measure_kernels
from experthub.routing.kernels.names import (
    FLOAT32_CPU_KERNELS,
    KERNELS,
    RENAMED_KERNELS,
    Kernel,
    find_recorded_name,
    parse_kernel,
)
from experthub.routing.kernels.prefilter import MIN_PREFILTERED_EXPERTS, Prefilter
from experthub.routing.kernels.reference import compute_reference
from experthub.routing.kernels.scores import compute_scores
from experthub.routing.lora_retriever import lora_retriever
from experthub.routing.mhr import mhr
from experthub.routing.phatgoose import SigmoidGate, make_gate, phatgoose
from experthub.routing.poly import poly
from experthub.routing.retrieval import build_index, retrieval
from experthub.routing.smear import smear
from experthub.routing.task import task
from experthub.routing.uniform import uniform
from experthub.routing.xlora import xlora

__all__ = [
    "AVERAGE",
    "FLOAT32_CPU_KERNELS",
    "KERNELS",
    "MIN_PREFILTERED_EXPERTS",
    "MULTI_HEADED",
    "RENAMED_KERNELS",
    "SERVED_BY",
    "VALUES",
    "Batch",
    "BatchTasks",
    "Context",
    "Embedder",
    "ExpertRows",
    "ExpertStack",
    "ForwardPass",
    "ForwardPasses",
    "Group",
    "Kernel",
    "ModelRouter",
    "PackedExperts",
    "Pool",
    "Prefilter",
    "RoutedLinear",
    "Router",
    "RouterMaterials",
    "RouterTraits",
    "Routing",
    "RowKey",
    "Select",
    "SigmoidGate",
    "SkilledLinear",
    "Skills",
    "State",
    "StateError",
    "StateTensors",
    "TopK",
    "Weights",
    "arrow",
    "attach_experts",
    "average_activation",
    "best_individual",
    "build_index",
    "check_heads",
    "compute_reference",
    "compute_scores",
    "describe_shape",
    "find_recorded_name",
    "group_modules",
    "lora_retriever",
    "make_gate",
    "measure_kernels",
    "mhr",
    "pack_experts",
    "parse_kernel",
    "phatgoose",
    "poly",
    "read_tensor",
    "record_routing",
    "retrieval",
    "routers",
    "smear",
    "standardise",
    "subtract_general",
    "task",
    "top_k_softmax",
    "uniform",
    "xlora",
]
