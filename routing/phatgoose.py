"""PHATGOOSE: each token goes to the experts whose own trained gates it agrees with most.

Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
https://arxiv.org/abs/2402.05859, section 3.  Two deviations: the weights of the top k are
renormalised exactly, where the authors' code divides by their sum + 1e-6; and where A x of all
experts is read, LayerNorm of the token is folded into the scores, `LN(x) . v = (x . v) / std(x)`,
which holds because a standardised gate v has mean zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from experthub.merge import Range
from experthub.routing._router import ExpertStack, Router, TopK, Weights, standardised
from experthub.routing._routers import Routing, routers
from torch import Tensor


@routers.register(
    paper="https://arxiv.org/abs/2402.05859", needs=("gates",), routing=Routing(sparse=True)
)
def phatgoose(
    stack: ExpertStack,
    *,
    top_k: Annotated[int, Range(1)] = 2,
    temperature: Annotated[float, Range(0.01, 100)] = 1.0,
) -> Router:
    """Token-wise gates, trained for each expert alone and compared at composition.

    Every token, at every module, goes to the `top_k` experts whose standardised gates have the
    largest product with the standardised input; their outputs are summed with softmax weights.

    top_k: experts per token and module, at least 1; more than there are means all.  temperature: of
    the softmax, 1 in the paper; a lower one comes closer to the best expert alone.
    """
    if stack.gates_EI is None:
        raise ValueError("phatgoose expects a gate of every expert, found none")
    scale = temperature * math.sqrt(stack.width)
    return TopK(standardised(stack.gates_EI) / scale, top_k, layer_norm=True)


@dataclass(frozen=True, eq=False)
class SigmoidGate:
    """The gate as it is trained: one expert, with the weight `sigmoid(x . gate + offset)`.

    Section 3.1 has no offset.
    """

    probes_PI: Tensor
    offset: float = 0.0
    layer_norm: bool = False
    pooled: bool = False

    def weights(self, scores: Tensor) -> Weights:
        return Weights(torch.sigmoid(scores + self.offset))


def untrained_gate(stack: ExpertStack, start: float = 0.5) -> SigmoidGate:
    """A gate of zeros for the stack's single expert: every token with the weight `start`, in (0, 1)."""
    return SigmoidGate(torch.zeros(1, stack.width), math.log(start / (1 - start)))
