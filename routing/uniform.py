"""Uniform: every expert of the recipe with the same weight, whatever the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from experthub.routing._router import ExpertStack, Router, Weights
from experthub.routing._routers import Routing, routers
from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    """The weight 1 / E for each, E counting the recipe's experts, so that the merge `linear` is equal."""

    n_here: int
    n_experts: int
    probes_PI: None = None
    layer_norm: bool = False
    pooled: bool = False

    def weights(self, scores: Tensor) -> Weights:
        return Weights(torch.full((self.n_here,), 1 / self.n_experts, device=scores.device))


@routers.register(paper="https://arxiv.org/abs/2408.07057", routing=Routing("nothing"))
def uniform(stack: ExpertStack) -> Router:
    """Mean of the experts, `y = W x + sum_e s_e B_e A_e x / E`; the control for every router.

    With the outputs combined it is the same function as the merge `linear` with equal weights.
    """
    return Uniform(len(stack.experts), stack.n_experts)
