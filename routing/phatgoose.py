"""PHATGOOSE: each token goes to the experts whose own trained gates it agrees with most.

Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
https://arxiv.org/abs/2402.05859, section 3.

There are two deviations from the authors' code:

- The weights of the top k are renormalised exactly; the authors divide by their sum + 1e-6.
- Where A x is computed for all experts, LayerNorm of the token is folded into the scores:
  `LN(x) . v = (x . v) / std(x)`. This holds because a standardised gate v has mean zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from experthub.merge import Range
from experthub.routing._router import ExpertStack, Router, TopK, Weights, standardise
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
    """Route tokens by gates that were trained for each expert alone.

    Every token, at every module, goes to the `top_k` experts whose standardised gates have the
    largest product with the standardised input. Their outputs are summed with softmax weights.

    Args:
        stack: The experts of a module, with their gates.
        top_k: Experts per token and module. A number above that of the experts means all of them.
        temperature: The temperature of the softmax; 1 in the paper. A lower one gives more weight to
            the best expert.

    Returns:
        The router of the module.

    Raises:
        ValueError: The experts have no gates.
    """
    return TopK(scale_gates(stack, temperature), top_k, layer_norm=True)


def scale_gates(stack: ExpertStack, temperature: float) -> Tensor:
    """Standardise the gates of experts, and divide them by `temperature * sqrt(I)`.

    Args:
        stack: The experts of a module, with their gates.
        temperature: The temperature of the softmax.

    Returns:
        The probes `[E, I]`.

    Raises:
        ValueError: The experts have no gates.
    """
    if stack.gates_EI is None:
        raise ValueError("expected a gate for every expert, found none")
    return standardise(stack.gates_EI) / (temperature * math.sqrt(stack.width))


@dataclass(frozen=True, eq=False)
class SigmoidGate:
    """The router with which a gate is trained: one expert with the weight `sigmoid(x . v + offset)`.

    Args:
        probes_PI: The gate v as a single probe `[1, I]`.
        offset: A constant that is added to the score; the paper (section 3.1) has none.
        layer_norm: Whether the probe reads the standardised input.
        pooled: Whether the router decides once for a row of tokens.
    """

    probes_PI: Tensor
    offset: float = 0.0
    layer_norm: bool = False
    pooled: bool = False

    def weights(self, scores: Tensor) -> Weights:
        """Compute the weight of the expert for every input.

        Args:
            scores: The scores of the gate `[T, G, 1]`, float32.

        Returns:
            Weights `[T, G, 1]` in (0, 1).
        """
        return Weights(torch.sigmoid(scores + self.offset))


def make_gate(stack: ExpertStack, start: float = 0.5) -> SigmoidGate:
    """Make an untrained gate: zeros, so that every token has the same weight.

    Args:
        stack: A single expert of a module.
        start: The weight of every token, in (0, 1).

    Returns:
        The gate, to be trained.
    """
    return SigmoidGate(torch.zeros(1, stack.width), math.log(start / (1 - start)))
