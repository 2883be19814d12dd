"""Pre-selection in bfloat16 or 8 bits chooses what the probes themselves choose."""

from __future__ import annotations

import pytest
import torch
from experthub.routing import Prefilter, TopK, compute_scores, standardise
from experthub.routing.kernels.prefilter import Bfloat16Probes, Int8Probes
from experthub.routing.kernels.scores import normalise_inputs
from torch import Tensor

TOKENS, WIDTH, EXPERTS, MODULES = 64, 48, 300, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near_each_other() -> Tensor:
    """Probes that bfloat16 cannot tell apart, in ten groups."""
    centres = random(MODULES, 10, 1, WIDTH)
    apart = 1e-4 * random(MODULES, 10, EXPERTS // 10, WIDTH, seed=1)
    return (centres + apart).view(-1, WIDTH)


PROBES = {
    "random": random(MODULES * EXPERTS, WIDTH),
    "near each other": near_each_other(),
    "each twice": random(MODULES, EXPERTS // 2, WIDTH).repeat(1, 2, 1).view(-1, WIDTH),
    "of all sizes": random(MODULES * EXPERTS, WIDTH) * random(MODULES * EXPERTS, 1).mul(8).exp(),
    "zero": torch.zeros(MODULES * EXPERTS, WIDTH),
}
FIRST = torch.arange(MODULES)[:, None] * EXPERTS
INPUTS = {
    "random": random(TOKENS, WIDTH, seed=2),
    "one large": random(TOKENS, WIDTH, seed=2) + 500 * torch.eye(WIDTH)[7],
    "small": random(TOKENS, WIDTH, seed=2) * 1e-6,
    "zero": torch.zeros(2, WIDTH),
}


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("of", PROBES)
@pytest.mark.parametrize("tokens", [TOKENS, 7, 1], ids=["bfloat16", "int8", "one"])
def test_it_chooses_what_all_scores_would(
    tokens: int, of: str, given: str, top_k: int, absolute: bool, layer_norm: bool
) -> None:
    probes = standardise(PROBES[of]) if layer_norm and of != "zero" else PROBES[of]
    router = TopK(probes[:EXPERTS], top_k, layer_norm, absolute)
    x = INPUTS[given][:tokens]
    found = Prefilter.of(probes, MODULES).choose(x, probes, router, FIRST)
    scores = compute_scores(x, probes, layer_norm).view(len(x), MODULES, EXPERTS)
    wanted = router.weights(scores)
    assert found.experts is not None and wanted.experts is not None
    # Scores round differently, one by one or in a product: as good, within that.
    best = router.rank_scores(scores)
    close = {"rtol": 1e-5, "atol": 1e-6 * float(best.abs().max())}
    torch.testing.assert_close(
        best.gather(-1, found.experts), best.gather(-1, wanted.experts), **close
    )
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-3, atol=1e-4)
    assert bool((found.experts.sort(-1).values.diff() > 0).all())


@pytest.mark.parametrize("of", PROBES)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_scores_are_no_further_off_than_said(of: str, layer_norm: bool) -> None:
    x, probes = normalise_inputs(10 * INPUTS["one large"], layer_norm), PROBES[of]
    exact = (x.double() @ probes.double().T).view(TOKENS, MODULES, -1)
    for coarse in (Bfloat16Probes.of(probes, MODULES), Int8Probes.of(probes, MODULES)):
        scores, error = coarse.compute_scores(x)
        rough = scores.view(exact.shape).double()
        off = (rough - exact).abs() - rough.abs() * coarse.relative
        assert bool((off.amax(-1) <= error).all())
        assert (
            float(error.max())
            < 0.1 * float(x.norm(dim=-1).max() * probes.norm(dim=-1).max()) + 1e-9
        )


@pytest.mark.parametrize("tokens", [TOKENS, 8])
def test_coarse_probes_alone_would_choose_others(tokens: int) -> None:
    probes, x = near_each_other(), random(tokens, WIDTH, seed=2)
    router = TopK(probes[:EXPERTS], 2)
    prefilter = Prefilter.of(probes, MODULES)
    coarse = prefilter.bfloat16 if tokens == TOKENS else prefilter.int8
    rough = router.weights(coarse.compute_scores(x)[0].float().view(tokens, 3, -1))
    exact = router.weights(compute_scores(x, probes, False).view(tokens, 3, -1))
    found = prefilter.choose(x, probes, router, FIRST)
    assert rough.experts is not None and exact.experts is not None and found.experts is not None
    assert not torch.equal(rough.experts, exact.experts)
    assert torch.equal(found.experts, exact.experts)


def test_no_tokens_choose_nothing() -> None:
    probes = random(MODULES * EXPERTS, WIDTH)
    found = Prefilter.of(probes, MODULES).choose(
        torch.empty(0, WIDTH), probes, TopK(probes[:EXPERTS], 2), FIRST
    )
    assert found.values.shape == (0, MODULES, 2)


def test_few_experts_are_all_read() -> None:
    probes = random(2 * 5, WIDTH)
    router = TopK(probes[:5], 2)
    x = INPUTS["random"]
    found = Prefilter.of(probes, 2).choose(x, probes, router, torch.tensor([[0], [5]]))
    torch.testing.assert_close(
        found.dense(5), router.weights(compute_scores(x, probes, False).view(TOKENS, 2, 5)).dense(5)
    )
