"""The experts of modules that share an input, packed: what a group keeps of them, and a bank stores.

Shapes as in `_router.py`; N rows of A of all modules and experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from experthub.routing._router import ExpertStack
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights of experts, and whose they are.

    experts: which of the recipe's adapt the modules, all of them the same.  ranks: by module, then
    expert.  a: rows `[., I]` of all modules and experts in their order, in any number of parts.  b:
    the rows `[R, O]` of each module.  A row of zeros may stand at the end of each, for ranks that
    differ.  mapped: they lie in a file, and are not to be copied.
    """

    experts: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    mapped: bool = False

    @classmethod
    def of(cls, stacks: Sequence[ExpertStack]) -> Packed:
        """The experts of modules that have the same ones."""
        return cls(
            stacks[0].experts,
            tuple(tuple(delta.rank for delta in stack.deltas.values()) for stack in stacks),
            tuple(delta.a for stack in stacks for delta in stack.deltas.values()),
            tuple(stack.b_RO for stack in stacks),
        )

    @property
    def rank(self) -> int:
        """The largest."""
        return max(chain(*self.ranks))

    @property
    def equal_ranks(self) -> bool:
        return len(set(chain(*self.ranks))) == 1

    @property
    def owner_N(self) -> Tensor:
        """For every row of A its expert and module: a place in `experts`, module after module."""
        flat = torch.tensor(list(chain(*self.ranks)))
        return torch.arange(len(flat)).repeat_interleave(flat)
