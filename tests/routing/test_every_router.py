"""Every router of the catalogue inside a whole model: caches, padding, neighbours, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub, tiny_bert
from experthub import hub
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.merge import Strategy
from experthub.routing import routers
from torch import Tensor

ROUTERS = [pytest.param(s, id=name) for name, s in routers.items()]
SMALL = {"steps": 2, "examples": 4, "size": 8}


def made_task(name: str, words: list[str]) -> str:
    """A task whose inputs are of a few words."""
    examples = []
    for number in range(60):
        text = " ".join(words[(number * 7 + i * 3) % len(words)] for i in range(4)) + f" {number}"
        choices = ["yes", "no"]
        key = example_id(text, choices)
        examples.append(Example(id=key, input=text, choices=choices, answer=number % 2))
    card = Card(name=name, source="made-up", template="{input}", labels=["yes", "no"])
    return write_task("made", card, examples)


@pytest.fixture(params=ROUTERS)
def recipe(
    request: Any, base_folder: Path, expert_folder: Callable[..., Path], tmp_path: Path
) -> dict[str, Any]:
    """A recipe that offers what the router says that it needs."""
    strategy: Strategy[Any] = request.param
    tasks = [made_task("animals", ["cat", "dog", "cow"]), made_task("colours", ["RED", "BLUE"])]
    options: dict[str, Any] = {k: v for k, v in SMALL.items() if k in strategy.options}
    if "embedder" in strategy.options:
        options["embedder"] = str(tiny_bert(tmp_path / "encoder"))
    recipe: dict[str, Any] = {"base": str(base_folder)}
    if "skills" in strategy.needs:
        shape = hub.InventoryShape(router=strategy.name, skills=2, rank=2)
        settings = hub.Settings(steps=2, batch_size=2)
        hub.train_skills(str(base_folder), tasks, "inventory", shape, settings)
        recipe["experts"] = ["inventory"]
    else:
        names = [f"expert-{seed}" for seed in range(2)]
        for seed, (name, task) in enumerate(zip(names, tasks, strict=True)):
            words = ("--name", name, "--base", base_folder, "--task", task)
            assert run_hub("add", expert_folder(seed), *words).code == 0
        recipe["experts"] = [{"expert": name, "weight": 0.2} for name in names]
    if strategy.needs_data:
        labels = strategy.needs_labels(strategy.bind(options))
        recipe["data"] = {"tasks": tasks, "labels": labels, "limit": 4}
    return recipe | {"route": {"method": strategy.name, **options}}


@contextmanager
def composed(recipe: dict[str, Any], device: str | None = None) -> Iterator[Any]:
    """Compose a recipe; a router by task is told the task of every row."""
    made = hub.compose(recipe, device=device)
    by_task = routers[recipe["route"]["method"]].traits.routing.input == "task"
    with made.tasks("made:colours") if by_task else nullcontext():
        yield made


@pytest.fixture
def composition(recipe: dict[str, Any]) -> Iterator[Any]:
    with composed(recipe) as made:
        yield made


def ids(count: int, length: int) -> Tensor:
    return torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(3))


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


@torch.no_grad()
def test_a_row_has_no_neighbours(composition: Any) -> None:
    model, tokens = composition.model, ids(4, 12)
    whole = model(input_ids=tokens).logits
    for i in range(4):
        alone = model(input_ids=tokens[i : i + 1]).logits
        torch.testing.assert_close(alone[0], whole[i], atol=1e-4, rtol=1e-4)


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
