"""Packed experts of modules that share an input, as banks store them and kernels read them.

Shapes as in `_router.py`; G modules, N rows of A of all modules and experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from experthub.merge import Combine
from experthub.routing._expert_rows import ExpertRows
from experthub.routing._router import ExpertStack, Router
from experthub.routing.kernels.prefilter import Prefilter
from torch import Tensor

Ranks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The experts of a group of modules with their router.

    Attributes:
        experts: The experts that adapt the modules, as positions in the recipe.
        ranks: For each module, the rank of each expert.
        a: The rows of A of all modules and experts, module after module.
        b: The rows of B of each module, with scale and recipe weight folded in.
        router: The router of the first module; the routers of the others differ only in probes.
        probes: The probes of all modules in float32, module after module; None for a router that
            does not look at the input.
        joint: One matrix of which A and the probes are views; None if they are stored apart.
        prefilter: Coarse copies of the probes, if there are any.
        owner_N: The expert and the module of each row of A: a position in `experts`, plus the number of
            experts for each module before. None if all ranks are equal.
        first_G1: The position of the first expert of each module, counted as in `owner_N`.
    """

    experts: tuple[int, ...]
    ranks: Ranks
    a: ExpertRows
    b: tuple[ExpertRows, ...]
    router: Router
    probes: Tensor | None
    joint: Tensor | None
    prefilter: Prefilter | None
    owner_N: Tensor | None
    first_G1: Tensor

    @classmethod
    def of(
        cls,
        experts: tuple[int, ...],
        ranks: Ranks,
        a: ExpertRows,
        b: tuple[ExpertRows, ...],
        router: Router,
        probes: Tensor | None = None,
        prefilter: Prefilter | None = None,
    ) -> PackedExperts:
        """Pack rows that are on one device.

        Args:
            experts: The experts that adapt the modules, as positions in the recipe.
            ranks: For each module, the rank of each expert.
            a: The rows of A of all modules; rows below those of the experts are the probes.
            b: The rows of B of each module.
            router: The router of the first module.
            probes: The probes of all modules in float32; None if they are below the rows of A.
            prefilter: Coarse copies of the probes, if there are any.

        Returns:
            The packed experts.
        """
        device, owner_N, joint = a.matrix.device, None, None
        if a.places_Er is not None:
            sizes = torch.tensor([*chain(*ranks)])
            owner_N = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
        below = a.matrix[len(a.own) : len(a.matrix) - (a.places_Er is not None)]
        if len(below) and probes is None:
            joint, probes = a.matrix[: len(a.own) + len(below)], below
        first_G1 = torch.arange(len(b), device=device)[:, None] * len(experts)
        return cls(experts, ranks, a, b, router, probes, joint, prefilter, owner_N, first_G1)

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedExperts:
        """Apply a function to each tensor except the prefilter's, such as a move to another device.

        Probes stay in float32, because scores are computed in it.

        Args:
            change: A function of one tensor that keeps its shape.

        Returns:
            The changed experts.
        """
        a, b = self.a.map(change), tuple(rows.map(change) for rows in self.b)
        apart = self.joint is None or a.matrix.dtype != torch.float32
        probes = self.probes.to(a.matrix.device) if self.probes is not None and apart else None
        return PackedExperts.of(self.experts, self.ranks, a, b, self.router, probes, self.prefilter)

    def with_prefilter(self) -> PackedExperts:
        """Add a prefilter if there is none.

        Returns:
            The same experts with a prefilter; without probes, the experts as they are.
        """
        if self.prefilter is not None or self.probes is None:
            return self
        return replace(self, prefilter=Prefilter.of(self.probes, len(self.b)))


def pack_experts(
    stacks: Sequence[ExpertStack], routers: Sequence[Router], like: Tensor, *, fuse: bool = True
) -> PackedExperts:
    """Pack the experts and routers of modules that `group_modules` put into one group.

    Args:
        stacks: The experts of each module.
        routers: The router of each module.
        like: A tensor whose dtype and device the factors get, such as a weight of the base.
        fuse: Whether to put the probes below A if dtypes allow it, so that one product reads the
            input for both.

    Returns:
        The packed experts.
    """
    ranks = tuple(tuple(delta.rank for delta in stack.deltas.values()) for stack in stacks)
    rank = max(map(max, ranks))
    parts = [delta.a for stack in stacks for delta in stack.deltas.values()]
    probes = [r.probes_PI.to(parts[0].device) for r in routers if r.probes_PI is not None]
    # Scores are computed in float32, so probes below a narrower A would be rounded.
    below = probes if fuse and like.dtype == torch.float32 else []
    # B is packed before A, because A then reuses memory, which is measurably faster.
    b = tuple(
        ExpertRows.of([stack.b_RO], own, rank, like=like)
        for stack, own in zip(stacks, ranks, strict=True)
    )
    a = ExpertRows.of(parts, [*chain(*ranks)], rank, below=below, like=like)
    apart = concatenate(probes).to(like.device) if probes and not below else None
    return PackedExperts.of(stacks[0].experts, ranks, a, b, routers[0], apart)


def group_modules(
    stacks: Sequence[ExpertStack], routers: Sequence[Router], combine: Combine = "outputs"
) -> list[list[int]]:
    """Decide which modules that share an input are packed together.

    They form one group if the same experts adapt them and their routers differ only in probes. If
    parameters are mixed, all experts must also have one rank.

    Args:
        stacks: The experts of each module.
        routers: The router of each module.
        combine: What is mixed: `outputs` or `parameters`.

    Returns:
        The positions of the modules in groups: all in one group, or each in a group of its own.
    """
    one = (
        len({stack.experts for stack in stacks}) == 1
        and len({stack.width for stack in stacks}) == 1
        and _differ_in_probes_only(routers)
        and (combine == "outputs" or len({d.rank for s in stacks for d in s.deltas.values()}) == 1)
    )
    return [list(range(len(stacks)))] if one else [[place] for place in range(len(stacks))]


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along their first dimension; a single one is not copied.

    Args:
        parts: At least one tensor.

    Returns:
        The concatenation.
    """
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _differ_in_probes_only(routers: Sequence[Router]) -> bool:
    """Return whether routers have one class and are equal in all fields except the probes."""
    first, *others = ([type(router), *_list_settings(router)] for router in routers)
    return all(len(first) == len(o) and all(map(_is_equal, first, o)) for o in others)


def _list_settings(router: Any) -> list[Any]:
    """List the values of a router's fields except the probes."""
    return [getattr(router, field.name) for field in fields(router) if field.name != "probes_PI"]


def _is_equal(a: Any, b: Any) -> bool:
    """Return whether two values are equal; tensors are compared by their content."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)
