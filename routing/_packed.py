"""The experts and routers of modules that share an input, packed: what a group is made of, and a bank stores.

Shapes as in `_router.py`; N rows of A of all modules and experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from experthub.routing._router import ExpertStack, Router
from experthub.routing._screen import Screen
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights of experts, whose they are, and what routes them.

    experts: which of the recipe's adapt the modules, all of them the same.  ranks: by module, then
    expert.  a: rows `[., I]` of all modules and experts in their order, in any number of parts.  b:
    the rows `[R, O]` of each module.  A row of zeros may stand at the end of each, for ranks that
    differ.  router: of one module; those of the others differ in nothing but probes.  probes: of
    all modules `[., I]`, module after module, in any number of parts; none for a router that does
    not look at the input.  screen: the same in bfloat16, where it was made.  mapped: all this lies in a file, and is not to be copied; the experts'
    dtype may be narrower there than they are used in.
    """

    experts: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    router: Router
    probes: tuple[Tensor, ...] = ()
    screen: Screen | None = None
    mapped: bool = False

    @classmethod
    def of(cls, stacks: Sequence[ExpertStack], routers: Sequence[Router]) -> Packed:
        """The experts of modules that have the same ones, and the routers of each; see `together`."""
        return cls(
            stacks[0].experts,
            tuple(tuple(delta.rank for delta in stack.deltas.values()) for stack in stacks),
            tuple(delta.a for stack in stacks for delta in stack.deltas.values()),
            tuple(stack.b_RO for stack in stacks),
            routers[0],
            tuple(r.probes_PI for r in routers if r.probes_PI is not None),
        )

    @cached_property
    def rank(self) -> int:
        """The largest."""
        return max(map(max, self.ranks))

    @cached_property
    def equal_ranks(self) -> bool:
        return all(own.count(self.rank) == len(own) for own in self.ranks)

    @property
    def owner_N(self) -> Tensor:
        """For every row of A its expert and module: a place in `experts`, module after module."""
        flat = torch.tensor([*chain(*self.ranks)])
        return torch.arange(len(flat)).repeat_interleave(flat)
