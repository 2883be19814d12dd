"""Modules that share an input are packed together."""

from __future__ import annotations

import pytest
import torch
from experthub.merge import LowRank
from experthub.routing import (
    ExpertStack,
    Kernel,
    RoutedLinear,
    TopK,
    attach_experts,
    group_modules,
    pack_experts,
    standardise,
)
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


@pytest.mark.parametrize("kernel", [None, "all", "gather", "sampled", "prefilter"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_cast_model_still_chooses_by_float32_scores(
    kernel: Kernel | None, layer_norm: bool
) -> None:
    """The experts are those of exact scores, and outputs are close, for few and many tokens."""
    stacks, base = [stack_of(2), stack_of(2)], nn.Linear(8, 5).requires_grad_(False)
    routers = [TopK(standardise(torch.randn(3, 8)), 2, layer_norm) for _ in stacks]
    packed = pack_experts(stacks, routers, base.weight)
    modules = nn.ModuleList(attach_experts([base, base], packed, kernel=kernel))
    for tokens in (3, 40):
        x = torch.randn(tokens, 8).bfloat16()
        expected = [(m(x.float()), m.compute_weights(x.float())) for m in modules]
        modules.bfloat16()
        for module, (y, weights) in zip(modules, expected, strict=True):
            torch.testing.assert_close(module(x).float(), y, atol=0.3, rtol=0.1)
            torch.testing.assert_close(module.compute_weights(x), weights)
        modules.float()


def test_trained_probes_of_a_cast_model() -> None:
    base, probes = nn.Linear(8, 5).requires_grad_(False), torch.randn(3, 8)
    module = RoutedLinear.from_stack(base, stack_of(2), TopK(probes, 2), train_probes=True)
    x = torch.randn(4, 8).bfloat16()
    assert module.bfloat16()(x).dtype == torch.bfloat16
