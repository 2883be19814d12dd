"""What a router sees that chooses experts for whole examples, before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from experthub.routing._router import Weights
from torch import Tensor

# What is known of B rows -> their weights `[B, E]` or `[B, k]` over the recipe's experts, or `[E]`.
Select = Callable[[Any], Weights]


@dataclass(frozen=True, eq=False)
class Pool:
    """All experts of a recipe.

    labels: what the recipe calls them.  tasks: what each was trained on, none if it does not say.
    state: what was made for this router: `index` `[N, D]`, unit embeddings of examples, and `owner`
    `[N]`, whose they are; or what the router found by itself.
    """

    labels: tuple[str, ...]
    tasks: tuple[tuple[str, ...], ...]
    state: Mapping[str, Tensor]

    @property
    def n_experts(self) -> int:
        return len(self.labels)


def one_hot(expert: int, n_experts: int) -> Tensor:
    """`[E]`: 1 for one expert."""
    return torch.nn.functional.one_hot(torch.tensor(expert), n_experts).float()
