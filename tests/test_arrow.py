"""Arrow against the definition of its prototypes, and against peft's layer."""

from __future__ import annotations

import pytest
import torch
from experthub.merge import LowRank
from experthub.routing import ExpertStack, RoutedLinear, arrow
from torch import nn


def experts(count: int, rank: int = 4) -> dict[int, LowRank]:
    """Random ones with a first singular value that stands out: peft's iteration needs it."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for e in range(count):
        a = torch.randn(rank, 24, generator=random)
        b = torch.randn(10, rank, generator=random)
        b[:, 0] *= 6
        found[e] = LowRank(a, b, 0.5 + e)
    return found


def test_prototypes_are_the_first_right_singular_vectors() -> None:
    stack = ExpertStack.of(experts(5), 5)
    probes = arrow(stack).probes_PI
    assert probes is not None
    for delta, v in zip(stack.deltas.values(), probes, strict=True):
        expected = torch.linalg.svd(delta.dense().double())[2][0].float()
        assert float((v @ expected).abs()) == pytest.approx(1, abs=1e-6)
        assert float(v.norm()) == pytest.approx(1, abs=1e-6)


def test_an_expert_of_zeros_has_no_direction() -> None:
    zero = LowRank(torch.zeros(4, 24), torch.zeros(10, 4))
    probes = arrow(ExpertStack.of({0: zero, 1: experts(1)[0]}, 2)).probes_PI
    assert probes is not None and not bool(probes[0].any()) and bool(probes[1].any())


@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_peft(top_k: int, temperature: float) -> None:
    arrow_of_peft = pytest.importorskip("peft.tuners.lora.arrow")
    from peft import ArrowConfig

    found = experts(5)
    torch.manual_seed(0)
    base = nn.Linear(24, 10).requires_grad_(False)
    x = torch.randn(2, 7, 24)
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    config.task_adapter_names = [f"task_{e}" for e in found]
    layer = arrow_of_peft.ArrowLoraLinearLayer(24, config)
    lora_a, lora_b, scaling = nn.ModuleDict(), nn.ModuleDict(), {}
    for e, delta in found.items():
        name = f"task_{e}"
        lora_a[name], lora_b[name] = nn.Linear(24, 4, bias=False), nn.Linear(4, 10, bias=False)
        lora_a[name].weight.data, lora_b[name].weight.data = delta.a, delta.b
        scaling[name] = delta.scale
    layer.build_prototypes(lora_a, lora_b)
    with torch.no_grad():
        expected = base(x) + layer(x, lora_a, lora_b, nn.Identity(), scaling)
        stack = ExpertStack.of(found, 5)
        routed = RoutedLinear.alone(base, stack, arrow(stack, top_k=top_k, temperature=temperature))
        torch.testing.assert_close(routed(x), expected, atol=1e-5, rtol=1e-5)
