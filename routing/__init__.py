"""Input-dependent mixing of experts; imports torch and `experthub.merge`."""

from experthub.routing._context import Context, Selected
from experthub.routing._group import Group, Kernel
from experthub.routing._kernels import reference, scored
from experthub.routing._measure import fastest, shape
from experthub.routing._methods import routers
from experthub.routing._packed import Packed
from experthub.routing._pool import Pool, Select
from experthub.routing._recording import recorded
from experthub.routing._routed_linear import RoutedLinear, routed, together
from experthub.routing._router import (
    ExpertStack,
    Router,
    TopK,
    Weights,
    standardised,
    top_k_softmax,
)
from experthub.routing._rows import Rows
from experthub.routing._screen import MANY, Screen
from experthub.routing._skilled_linear import SkilledLinear, TaskRows
from experthub.routing._skills import AVERAGE, Skills, check_heads
from experthub.routing.arrow import arrow
from experthub.routing.average_activation import average_activation
from experthub.routing.best_individual import best_individual
from experthub.routing.lora_retriever import lora_retriever
from experthub.routing.mhr import mhr
from experthub.routing.phatgoose import SigmoidGate, phatgoose, untrained_gate
from experthub.routing.poly import poly
from experthub.routing.retrieval import retrieval
from experthub.routing.smear import smear
from experthub.routing.task import task
from experthub.routing.uniform import uniform
from experthub.routing.xlora import untrained_classifier, xlora

__all__ = [
    "AVERAGE",
    "MANY",
    "Context",
    "ExpertStack",
    "Group",
    "Kernel",
    "Packed",
    "Pool",
    "RoutedLinear",
    "Router",
    "Rows",
    "Screen",
    "Select",
    "Selected",
    "SigmoidGate",
    "SkilledLinear",
    "Skills",
    "TaskRows",
    "TopK",
    "Weights",
    "arrow",
    "average_activation",
    "best_individual",
    "check_heads",
    "fastest",
    "lora_retriever",
    "mhr",
    "phatgoose",
    "poly",
    "recorded",
    "reference",
    "retrieval",
    "routed",
    "routers",
    "scored",
    "shape",
    "smear",
    "standardised",
    "task",
    "together",
    "top_k_softmax",
    "uniform",
    "untrained_classifier",
    "untrained_gate",
    "xlora",
]
