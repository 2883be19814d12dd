"""Every router of the catalogue inside a whole model: caches, padding, neighbours, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from every_router import composed, make_recipe
from every_router import some_ids as ids
from experthub.routing import routers

ROUTERS = [pytest.param(s, id=name) for name, s in routers.items()]


@pytest.fixture(params=ROUTERS)
def recipe(
    request: Any, base_folder: Path, expert_folder: Callable[..., Path], tmp_path: Path
) -> dict[str, Any]:
    """A recipe that offers what the router says that it needs."""
    return make_recipe(request.param, base_folder, expert_folder, tmp_path)


@pytest.fixture
def composition(recipe: dict[str, Any]) -> Iterator[Any]:
    with composed(recipe) as made:
        yield made


@pytest.mark.sampled(5)
@torch.no_grad()
def test_in_chunks_with_a_cache(composition: Any) -> None:
    model, tokens = composition.model, ids(2, 16)
    by_example = composition.plan.recipe.method.strategy.traits.routing.input == "example"
    for chunks in ([1] * 16, [12, 1, 1, 1, 1], [5, 11]):
        # A router by example decides when the first tokens of an example are read.
        first = model(input_ids=tokens[:, : chunks[0]]).logits if by_example else None
        whole = model(input_ids=tokens).logits
        cache, found = None, []
        for part in tokens.split(chunks, 1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [*found, out.logits]
        if first is None:
            torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(found[0], first, atol=1e-4, rtol=1e-4)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_padded_on_either_side(composition: Any, left: bool) -> None:
    model, tokens, lengths = composition.model, ids(3, 16), (16, 7, 1)
    alone = [model(input_ids=tokens[i : i + 1, :n]).logits[0] for i, n in enumerate(lengths)]
    batch, mask = torch.zeros(3, 16, dtype=torch.long), torch.zeros(3, 16, dtype=torch.long)
    places = [slice(16 - n, 16) if left else slice(0, n) for n in lengths]
    for i, (n, here) in enumerate(zip(lengths, places, strict=True)):
        batch[i, here], mask[i, here] = tokens[i, :n], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=batch, attention_mask=mask, position_ids=positions).logits
    assert bool(logits.isfinite().all())
    for i, here in enumerate(places):
        torch.testing.assert_close(logits[i, here], alone[i], atol=1e-4, rtol=1e-4)


@pytest.mark.sampled(5)
@torch.no_grad()
def test_a_row_has_no_neighbours(composition: Any) -> None:
    model, tokens = composition.model, ids(4, 12)
    whole = model(input_ids=tokens).logits
    for i in range(4):
        alone = model(input_ids=tokens[i : i + 1]).logits
        torch.testing.assert_close(alone[0], whole[i], atol=1e-4, rtol=1e-4)


@pytest.mark.sampled(5)
@torch.no_grad()
def test_detaching_gives_the_base_bit_for_bit(composition: Any) -> None:
    from transformers import AutoModelForCausalLM

    tokens = ids(2, 12)
    base = AutoModelForCausalLM.from_pretrained(composition.plan.base.folder).eval()
    expected = base(input_ids=tokens).logits
    changed = composition.model(input_ids=tokens).logits
    assert not torch.equal(changed, expected)
    before = base.state_dict()
    assert composition.model.state_dict().keys() == before.keys()
    detached = composition.detach()
    assert torch.equal(detached(input_ids=tokens).logits, expected)
    assert all(torch.equal(t, before[n]) for n, t in detached.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu(recipe: dict[str, Any]) -> None:
    """The state is made on the GPU, and gives the same model on the CPU."""
    with composed(recipe, "cuda") as made:
        found = made.model(ids(3, 6).cuda()).logits.cpu()
    with composed(recipe) as made:
        torch.testing.assert_close(found, made.model(ids(3, 6)).logits, atol=1e-2, rtol=1e-2)
