"""SMEAR: every example uses its own weighted average of all experts, at every module.

Muqeeth, Liu and Raffel, "Soft Merging of Experts with Adaptive Routing",
https://arxiv.org/abs/2306.03745, section 3. The router reads the mean of the example's tokens, and
the experts' parameters are averaged with the softmax of its scores.

There is one deviation: the paper trains routers and experts together. Here the router consists of
the PHATGOOSE gates that were trained for each expert alone, as in https://arxiv.org/abs/2402.05859.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from experthub.merge import Range
from experthub.routing._router import ExpertStack, Router, Weights
from experthub.routing._routers import Routing, routers
from experthub.routing.phatgoose import scale_gates
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Smear:
    """A softmax over the mean scores of a row's tokens.

    Args:
        probes_PI: The probes `[E, I]`: one standardised gate per expert.
        layer_norm: Whether the probes read the standardised input.
        pooled: Whether the router decides once for a row of tokens.
    """

    probes_PI: Tensor
    layer_norm: bool = True
    pooled: bool = True

    def weights(self, scores: Tensor) -> Weights:
        """Compute the weights of all experts for every row.

        Args:
            scores: The mean scores `[B, G, E]` of the rows' tokens, float32.

        Returns:
            Weights `[B, G, E]` that sum to 1.
        """
        return Weights(scores.softmax(-1))


@routers.register(
    paper="https://arxiv.org/abs/2306.03745",
    needs=("gates",),
    routing=Routing("example", "module", combines=("parameters", "outputs")),
)
def smear(stack: ExpertStack, *, temperature: Annotated[float, Range(0.01, 100)] = 1.0) -> Router:
    """Average all experts for every example, by the mean gate scores of its tokens.

    The tokens that are read first decide: those of a prompt, and not those of its continuation.
    Padding is ignored.

    Args:
        stack: The experts of a module, with their gates.
        temperature: The temperature of the softmax. A lower one gives more weight to the best expert.

    Returns:
        The router of the module.

    Raises:
        ValueError: The experts have no gates.
    """
    return Smear(scale_gates(stack, temperature))
