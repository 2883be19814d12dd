"""PHATGOOSE and Arrow repeat what the authors' code and mttl's did to one linear module.

tests/golden/phatgoose.json and mttl.json are written by the scripts next to them, in environments
of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from experthub.merge import LowRank
from experthub.routing import (
    ExpertStack,
    Kernel,
    RoutedLinear,
    Router,
    compute_scores,
    make_gate,
    routers,
)
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "golden"
OFFICIAL, MTTL = (json.loads((FOLDER / f"{n}.json").read_text()) for n in ("phatgoose", "mttl"))
# The official code divides the weights of the top 2 by their sum + 1e-6, we by their sum s, which is
# at least 2/5 of 5 experts: all weights differ by the factor 1 + 1e-6 / s, within this tolerance.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
MIXING: dict[str, Any] = {
    "phatgoose": {"options": {"top_k": 2}, "combine": "outputs"},
    "arrow": {"options": {"top_k": 5, "temperature": 1.0}, "combine": "parameters"},
}
KERNELS: tuple[Kernel, ...] = ("all", "gather", "sampled")
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_official = pytest.mark.parametrize(
    "case", OFFICIAL["cases"][:3], ids=lambda case: f"{case['experts']} experts"
)
each_of_mttl = pytest.mark.parametrize(
    "case", MTTL["cases"], ids=lambda case: f"{case['method']}-{case['experts']}"
)


def float32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def linear(golden: Any) -> nn.Linear:
    weight = float32(golden["weight"])
    made = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    made.load_state_dict({"weight": weight, "bias": float32(golden["bias"])})
    return made


def stack_of(golden: Any, count: int, alpha: float) -> ExpertStack:
    """The first of the recorded experts, of scale alpha / rank."""
    a, b, gates = (float32(golden[key]) for key in ("a", "b", "gates"))
    deltas = {e: LowRank(a[e], b[e], alpha / golden["rank"]) for e in range(count)}
    return ExpertStack.of(deltas, count, {e: gates[e] for e in range(count)})


def check(golden: Any, case: Any, stack: ExpertStack, method: str, kernel: Kernel) -> Router:
    """Compare weights and outputs of a registered router with the recorded ones."""
    mixing = MIXING[method]
    router: Router = routers[method].call(stack, **mixing["options"])
    routed = RoutedLinear.from_stack(
        linear(golden), stack, router, mixing["combine"], kernel=kernel
    )
    x = float32(golden["x"])
    torch.testing.assert_close(routed.compute_weights(x), float32(case["weights"]), **TOLERANCE)
    torch.testing.assert_close(routed(x), float32(case["output"]), **TOLERANCE)
    return router


@each_kernel
@each_official
def test_phatgoose_equals_the_authors_code(case: Any, kernel: Kernel) -> None:
    stack = stack_of(OFFICIAL, case["experts"], alpha=1)
    router = check(OFFICIAL, case, stack, "phatgoose", kernel)
    scores = compute_scores(
        float32(OFFICIAL["x"]).flatten(0, 1), router.probes_PI, router.layer_norm
    )
    expected = float32(case["scores"]).flatten(0, 1)
    torch.testing.assert_close(scores, expected, **TOLERANCE)
    probabilities = float32(case["probabilities"]).flatten(0, 1)
    torch.testing.assert_close(scores.softmax(-1), probabilities, **TOLERANCE)


def test_a_gate_in_training_equals_the_authors_code() -> None:
    stack = stack_of(OFFICIAL, 1, alpha=1)
    gated = RoutedLinear.from_stack(linear(OFFICIAL), stack, make_gate(stack), train_probes=True)
    assert stack.gates_EI is not None and gated.probes_PI is not None
    gated.probes_PI.data.copy_(stack.gates_EI)
    expected = float32(OFFICIAL["cases"][3]["output"])
    torch.testing.assert_close(gated(float32(OFFICIAL["x"])).detach(), expected, **TOLERANCE)


@each_kernel
@each_of_mttl
def test_equals_mttl(case: Any, kernel: Kernel) -> None:
    check(MTTL, case, stack_of(MTTL, case["experts"], MTTL["alpha"]), case["method"], kernel)


def test_prototypes_equal_mttls_up_to_sign() -> None:
    probes = routers["arrow"].call(stack_of(MTTL, 5, MTTL["alpha"])).probes_PI
    recorded = float32(MTTL["prototypes"])
    signs = (probes * recorded).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(probes * signs, recorded, **TOLERANCE)


def test_the_recorded_cases_tell_variants_apart() -> None:
    """Other k, other normalisations, a mix of outputs where parameters are mixed: none would pass."""
    x, stack = float32(MTTL["x"]), stack_of(MTTL, 5, MTTL["alpha"])
    phatgoose, arrow = (float32(c["output"]) for c in MTTL["cases"] if c["experts"] == 5)
    variants: list[tuple[str, dict[str, Any], Any, Tensor]] = [
        ("phatgoose", {"top_k": 1}, "outputs", phatgoose),
        ("phatgoose", {"top_k": 3}, "outputs", phatgoose),
        ("phatgoose", {"top_k": 2}, "parameters", phatgoose),
        ("phatgoose", {"top_k": 2, "temperature": 1.01}, "outputs", phatgoose),
        ("arrow", {"top_k": 5}, "outputs", arrow),
        ("arrow", {"top_k": 3}, "parameters", arrow),
    ]
    for method, options, combine, recorded in variants:
        router = routers[method].call(stack, **options)
        found = RoutedLinear.from_stack(linear(MTTL), stack, router, combine)(x)
        assert float((found - recorded).abs().max()) > 1e-3


def test_the_recorded_cases_meet_the_epsilons() -> None:
    """A token of small variance shows the epsilons of the official normalisation and of LayerNorm."""
    for case in OFFICIAL["cases"][:3]:
        top = torch.tensor(case["probabilities"]).double().topk(min(2, case["experts"])).values
        total = torch.tensor(case["weights"], dtype=torch.float64).sum(-1)
        s = top.sum(-1)
        torch.testing.assert_close(total, s / (s + 1e-6), atol=1e-8, rtol=0)
        assert float(total.max()) < 1 - 9e-7
    assert float(torch.tensor(OFFICIAL["x"]).var(-1).min()) < 1e-4
