"""AdaMerging written out literally repeats what fusion_bench's classes did, step by step.

tests/golden/adamerging.json is written by the script next to it, in fusion_bench's own environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.tiny import Tiny, logits
from torch import Tensor

EPSILON = {"fusion_bench": 1e-8, "literal": 0.0}  # what is added to p in its logarithm


def float64(value: Any) -> Any:
    """Lists of numbers as tensors, in whatever holds them by name or in turn."""
    if isinstance(value, dict):
        return {key: float64(x) for key, x in value.items()}
    if isinstance(value[0], dict) or len({len(x) for x in value if isinstance(x, list)}) > 1:
        return [float64(x) for x in value]
    return torch.tensor(value, dtype=torch.float64)


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "adamerging.json").read_text())
CASES = {
    f"{c['granularity']}-{'clamped' if c['clamped'] else 'free'}-{c['lr']}-{c['entropy']}": c
    for c in GOLDEN["cases"]
}
WEIGHTS, VECTORS = float64(GOLDEN["parameters"]), float64(GOLDEN["task_vectors"])
HEADS, BATCHES = float64(GOLDEN["heads"]), float64(GOLDEN["batches"])
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def initial(case: dict[str, Any]) -> Tensor:
    """The coefficients before the first step: `[E]` for task, `[E, parameters in order]` for layer."""
    shape = (len(VECTORS),) if case["granularity"] == "task" else (len(VECTORS), len(WEIGHTS))
    return torch.full(shape, GOLDEN["initial"], dtype=torch.float64)


def losses(c: Tensor, batches: Tensor, clamped: bool, epsilon: float) -> Tensor:
    """The mean entropy of each task's predictions with W = W0 + sum c tau."""
    c = c.clamp(0, 1) if clamped else c
    weights = dict(WEIGHTS)
    for c_of_expert, vector in zip(c, VECTORS, strict=True):
        for place, name in enumerate(GOLDEN["order"]):
            c_here = c_of_expert if c.ndim == 1 else c_of_expert[place]
            weights[name] = weights[name] + c_here * vector[name]
    model, found = Tiny(), []
    for x, head in zip(batches, HEADS, strict=True):
        p = logits(torch.func.functional_call(model, weights, (x,)), head).softmax(-1)
        found.append(-(p * (p + epsilon).log()).sum(-1).mean())
    return torch.stack(found)


def replay(case: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Losses before, gradients of, and coefficients after each step of Adam."""
    c, m, v = initial(case), torch.zeros(()), torch.zeros(())
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for step, batches in enumerate(BATCHES, 1):
        c = c.detach().requires_grad_()
        loss = losses(c, batches, case["clamped"], EPSILON[case["entropy"]])
        (g,) = torch.autograd.grad(loss.sum(), c)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        c = c - case["lr"] * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        for values, value in zip(found, (loss, g, c), strict=True):
            values.append(value.detach())
    return found


def difference(a: Tensor, b: Any) -> float:
    return float((a - float64(b)).abs().max())


@each_case
def test_the_literal_algorithm_repeats_the_recorded_steps(case: dict[str, Any]) -> None:
    loss, gradient, coefficients = replay(case)
    assert difference(gradient[0], case["first_gradient"]) < 1e-10
    assert difference(torch.stack(loss), case["losses"]) < 1e-10
    assert difference(torch.stack(coefficients), case["coefficients"]) < 1e-10


def test_the_recorded_cases_tell_the_variants_apart() -> None:
    """A difference above the tolerance between any two that use one learning rate: else one could pass for another."""
    cases = [c for c in CASES.values() if c["lr"] == 0.1 and c["granularity"] == "layer"]
    for n, a in enumerate(cases):
        for b in cases[:n]:
            assert difference(float64(a["coefficients"]), b["coefficients"]) > 1e-9


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_clamped_coefficients_are_recorded_on_both_sides_and_never_come_back(
    granularity: str,
) -> None:
    steps = float64(CASES[f"{granularity}-clamped-0.1-fusion_bench"]["coefficients"])
    outside = (steps < 0) | (steps > 1)
    assert (steps < 0).any() and (steps > 1).any()
    assert not (outside[:-1] & ~outside[1:]).any()


def test_a_parameter_that_an_expert_leaves_alone_keeps_its_coefficient() -> None:
    place = GOLDEN["order"].index("norm.bias")
    steps = float64(CASES["layer-free-0.1-fusion_bench"]["coefficients"])
    assert (steps[:, -1, place] == GOLDEN["initial"]).all()
