"""Input-dependent mixing of experts; imports torch and `experthub.merge`."""

from experthub.routing._group import Combine, Group, Kernel
from experthub.routing._kernels import reference
from experthub.routing._measure import fastest, shape
from experthub.routing._methods import routers
from experthub.routing._routed_linear import RoutedLinear, routed
from experthub.routing._router import (
    ExpertStack,
    Router,
    Weights,
    standardised,
    top_k_softmax,
)
from experthub.routing.arrow import arrow
from experthub.routing.phatgoose import SigmoidGate, phatgoose, untrained_gate
from experthub.routing.uniform import uniform

__all__ = [
    "Combine",
    "ExpertStack",
    "Group",
    "Kernel",
    "RoutedLinear",
    "Router",
    "SigmoidGate",
    "Weights",
    "arrow",
    "fastest",
    "phatgoose",
    "reference",
    "routed",
    "routers",
    "shape",
    "standardised",
    "top_k_softmax",
    "uniform",
    "untrained_gate",
]
