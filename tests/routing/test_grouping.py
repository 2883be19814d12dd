"""Modules that share an input are packed together."""

from __future__ import annotations

import torch
from experthub.merge import LowRank
from experthub.routing import ExpertStack, TopK, attach_experts, group_modules, pack_experts
from torch import Tensor, nn


def stack_of(rank: int, experts: tuple[int, ...] = (0, 1, 2)) -> ExpertStack:
    """Stack random experts of one rank for a module of 8 inputs and 5 outputs."""
    random = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    return ExpertStack.of({e: LowRank(draw(rank, 8), draw(5, rank), 1.0) for e in experts}, 3)


def test_modules_with_other_ranks_share_a_group_unless_parameters_are_mixed() -> None:
    stacks, routers = [stack_of(2), stack_of(4)], [TopK(torch.randn(3, 8), 2) for _ in range(2)]
    assert group_modules(stacks, routers, "outputs") == [[0, 1]]
    assert group_modules(stacks, routers, "parameters") == [[0], [1]]
    for stack, router in zip(stacks, routers, strict=True):
        base = nn.Linear(8, 5).requires_grad_(False)
        packed = pack_experts([stack], [router], base.weight)
        (module,) = attach_experts([base], packed, "parameters")
        assert module(torch.randn(3, 8)).shape == (3, 5)


def test_other_experts_and_other_settings_stand_apart() -> None:
    probes = torch.randn(3, 8)
    stacks = [stack_of(2), stack_of(2)]
    assert group_modules(stacks, [TopK(probes, 1), TopK(probes, 2)]) == [[0], [1]]
    others = [stack_of(2), stack_of(2, experts=(0, 1))]
    assert group_modules(others, [TopK(probes, 1), TopK(probes[:2], 1)]) == [[0], [1]]
