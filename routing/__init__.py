"""Input-dependent mixing of experts; imports torch and `experthub.merge`."""

from experthub.routing._kernels import reference
from experthub.routing._methods import routers
from experthub.routing._routed_linear import Combine, RoutedLinear
from experthub.routing._router import ExpertStack, Router, standardised, top_k_softmax
from experthub.routing.phatgoose import SigmoidGate, phatgoose, untrained_gate
from experthub.routing.uniform import uniform

__all__ = [
    "Combine",
    "ExpertStack",
    "RoutedLinear",
    "Router",
    "SigmoidGate",
    "phatgoose",
    "reference",
    "routers",
    "standardised",
    "top_k_softmax",
    "uniform",
    "untrained_gate",
]
