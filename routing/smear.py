"""SMEAR: each example has a merge of its own, at every module, of all experts.

Muqeeth, Liu and Raffel, "Soft Merging of Experts with Adaptive Routing",
https://arxiv.org/abs/2306.03745, section 3: the router reads the mean of the example's tokens, and
the experts' parameters are averaged with its softmax.  One deviation: the paper trains routers and
experts together; here the router is made of the experts' own PHATGOOSE gates, after the fact, as
https://arxiv.org/abs/2402.05859 does for tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from experthub.merge import Range
from experthub.routing._router import ExpertStack, Router, Weights, standardised
from experthub.routing._routers import Routing, routers
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Smear:
    """Softmax over the mean scores of a row's tokens."""

    probes_PI: Tensor
    layer_norm: bool = True
    pooled: bool = True

    def weights(self, scores: Tensor) -> Weights:
        return Weights(scores.softmax(-1))


@routers.register(
    paper="https://arxiv.org/abs/2306.03745",
    needs=("gates",),
    routing=Routing("example", "module", combines=("parameters", "outputs")),
)
def smear(stack: ExpertStack, *, temperature: Annotated[float, Range(0.01, 100)] = 1.0) -> Router:
    """A soft merge of all experts for every example, by the mean of its tokens' gate scores.

    The tokens that are read first decide, a prompt's before its continuation; padding has no say.

    temperature: of the softmax; a lower one comes closer to one expert.
    """
    if stack.gates_EI is None:
        raise ValueError("smear expects a gate of every expert, found none")
    return Smear(standardised(stack.gates_EI) / (temperature * math.sqrt(stack.width)))
