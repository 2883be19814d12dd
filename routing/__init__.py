"""Input-dependent mixing of experts; imports torch and `experthub.merge`."""

from experthub.routing._context import Context, Selected
from experthub.routing._group import Group, Kernel
from experthub.routing._kernels import reference
from experthub.routing._measure import fastest, shape
from experthub.routing._methods import routers
from experthub.routing._packed import Packed
from experthub.routing._pool import Pool, Select
from experthub.routing._recording import recorded
from experthub.routing._routed_linear import RoutedLinear, routed, together
from experthub.routing._router import (
    ExpertStack,
    Router,
    Weights,
    standardised,
    top_k_softmax,
)
from experthub.routing._rows import Rows
from experthub.routing.arrow import arrow
from experthub.routing.average_activation import average_activation
from experthub.routing.best_individual import best_individual
from experthub.routing.lora_retriever import lora_retriever
from experthub.routing.phatgoose import SigmoidGate, phatgoose, untrained_gate
from experthub.routing.retrieval import retrieval
from experthub.routing.smear import smear
from experthub.routing.task import task
from experthub.routing.uniform import uniform
from experthub.routing.xlora import untrained_classifier, xlora

__all__ = [
    "Context",
    "ExpertStack",
    "Group",
    "Kernel",
    "Packed",
    "Pool",
    "RoutedLinear",
    "Router",
    "Rows",
    "Select",
    "Selected",
    "SigmoidGate",
    "Weights",
    "arrow",
    "average_activation",
    "best_individual",
    "fastest",
    "lora_retriever",
    "phatgoose",
    "recorded",
    "reference",
    "retrieval",
    "routed",
    "routers",
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
