"""Uniform: every expert of the recipe has the same weight for every input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from experthub.routing._router import ExpertStack, Router, Weights
from experthub.routing._routers import Routing, routers
from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    """The weight 1 / E for every expert.

    E counts all experts of the recipe, as in the merge `linear`, and not only those that adapt the
    module.

    Args:
        n_here: The number of experts that adapt the module.
        n_experts: The number of experts of the recipe.
        probes_PI: None, because the router does not look at the input.
        layer_norm: Not used without probes.
        pooled: Not used without probes.
    """

    n_here: int
    n_experts: int
    probes_PI: None = None
    layer_norm: bool = False
    pooled: bool = False

    def weights(self, scores: Tensor) -> Weights:
        """Return the weights of every input.

        Args:
            scores: Scores `[T, G, 0]`; only their device is used.

        Returns:
            Equal weights, one for each expert that adapts the module.
        """
        return Weights(torch.full((self.n_here,), 1 / self.n_experts, device=scores.device))


@routers.register(paper="https://arxiv.org/abs/2408.07057", routing=Routing("nothing"))
def uniform(stack: ExpertStack) -> Router:
    """Average the outputs of all experts: `y = W x + sum_e s_e B_e A_e x / E`.

    It is the control for every router. With `combine: outputs` it is the same function as the merge
    `linear` with equal weights.

    Args:
        stack: The experts of a module.

    Returns:
        The router of the module.
    """
    return Uniform(len(stack.experts), stack.n_experts)
