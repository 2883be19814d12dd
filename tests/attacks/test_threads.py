"""Threads, tasks of asyncio and nested models that share one composition get what each gets alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from every_router import TASKS, make_recipe, name_task, some_ids
from experthub import hub
from experthub.hub.composition.generation import generate_text
from experthub.hub.errors import UsageError
from experthub.merge import Strategy
from experthub.routing import record_routing, routers
from torch import Tensor

pytestmark = pytest.mark.attack

Make = Callable[..., Path]
THREADS, CALLS = 8, 400
# By example or by task: the routers whose decisions once hung on the model.
SHARED = ["smear", "task", "retrieval", "lora_retriever", "xlora"]
EVERY = [
    pytest.param(strategy, combine, id=f"{name}-{combine}")
    for name, strategy in routers.items()
    for combine in strategy.traits.routing.combines
]


@pytest.fixture(autouse=True)
def one_thread_each() -> Iterator[None]:
    """Torch computes with one thread, so that eight callers do not get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def composed(base_folder: Path, expert_folder: Make, tmp_path: Path) -> Callable[..., Any]:
    """A function that composes two tiny experts with a router."""

    def make(strategy: Strategy[Any] | str, **route: Any) -> tuple[Any, dict[str, Any]]:
        strategy = routers[strategy] if isinstance(strategy, str) else strategy
        recipe = make_recipe(strategy, base_folder, expert_folder, tmp_path)
        recipe["route"] |= route
        return hub.compose(recipe), recipe

    return make


def make_batches() -> list[dict[str, Tensor]]:
    """Batches of mixed sizes and lengths: whole, padded on the left, and padded on the right."""
    batches = []
    for number in range(12):
        rows, length = 1 + number % 3, 3 + 5 * (number % 4)
        ids, mask = some_ids(rows, length, seed=number), torch.ones(rows, length, dtype=torch.long)
        for row in range(1, rows):
            padding = slice(0, row) if number % 2 else slice(length - row, length)
            mask[row, padding] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run jobs in eight threads; the results in the order of the jobs."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(job) for job in jobs]
        return [future.result() for future in futures]


def count_wrong(jobs: list[Callable[[], Tensor]], times: int) -> int:
    """Run every job alone and then all of them in threads; count the results that differ in a bit."""
    alone = [job() for job in jobs]
    order = [number * 7 % len(jobs) for number in range(times)]
    found = in_threads([jobs[number] for number in order])
    return sum(not torch.equal(one, alone[n]) for one, n in zip(found, order, strict=True))


@pytest.mark.sampled(7)
@pytest.mark.parametrize(("strategy", "combine"), EVERY)
def test_threads_get_what_each_gets_alone(
    composed: Callable[..., Any], strategy: Strategy[Any], combine: str
) -> None:
    composition, recipe = composed(strategy, combine=combine)

    def read(number: int, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), name_task(composition, recipe, number):
            logits: Tensor = composition.model(**batch).logits
        return logits

    def write(number: int, ways: dict[str, Any]) -> Tensor:
        ids, mask = some_ids(2, 6, seed=number), torch.ones(2, 6, dtype=torch.long)
        mask[1, : number % 4] = 0  # Padding on the left.
        with name_task(composition, recipe, number):
            ids = composition.model.generate(
                input_ids=ids * mask, attention_mask=mask, max_new_tokens=3, **ways
            )
        return ids

    reading = [lambda n=n, b=b: read(n, b) for n, b in enumerate(make_batches())]
    assert count_wrong(reading, CALLS) == 0
    ways = [{"do_sample": False}, {"do_sample": False, "num_beams": 3}]
    writing = [lambda n=n: write(n, ways[n % 2]) for n in range(8)]
    assert count_wrong(writing, 16) == 0


@pytest.mark.parametrize("method", SHARED)
def test_two_threads_that_meet_inside_the_forward_pass(
    composed: Callable[..., Any], method: str
) -> None:
    """Each of the two has decided, and has read one layer, before the other goes on."""
    composition, recipe = composed(method)
    meeting: list[Barrier] = []

    def meet(*_: Any) -> None:
        for barrier in meeting:
            barrier.wait(timeout=60)

    for layer in composition.model.model.layers:
        layer.register_forward_pre_hook(meet)
        layer.self_attn.q_proj.register_forward_hook(meet)
    batches = [{"input_ids": some_ids(2, 9, seed=seed)} for seed in (1, 2)]

    def read(number: int) -> Tensor:
        with torch.no_grad(), name_task(composition, recipe, number):
            out = composition.model(**batches[number], use_cache=True)
            more = composition.model(
                input_ids=some_ids(2, 1, number), past_key_values=out.past_key_values
            )
        return torch.cat([out.logits, more.logits], 1)

    alone = [read(0), read(1)]
    meeting.append(Barrier(2))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read, (0, 1)))
    assert torch.equal(found[0], alone[0]) and torch.equal(found[1], alone[1])


def test_tasks_are_named_for_their_thread(composed: Callable[..., Any]) -> None:
    """A thread that was started in the block sees no task; one of asyncio sees those of its caller."""
    composition, _ = composed("task")
    ids = some_ids(1, 7)

    def read() -> Tensor:
        with torch.no_grad():
            logits: Tensor = composition.model(input_ids=ids).logits
        return logits

    nothing = read()
    alone = []
    for task in TASKS:
        with composition.tasks(task):
            alone.append(read())
    assert not torch.equal(*alone)
    with composition.tasks(TASKS[0]):
        assert torch.equal(in_threads([read])[0], nothing)
        with composition.tasks(TASKS[1]):
            assert torch.equal(read(), alone[1])
        assert torch.equal(read(), alone[0])
    assert torch.equal(read(), nothing)

    async def ask(task: str) -> list[Tensor]:
        with composition.tasks(task):
            await asyncio.sleep(0.01)
            here = read()
            return [here, await asyncio.to_thread(read)]

    async def ask_all() -> list[list[Tensor]]:
        return await asyncio.gather(*map(ask, TASKS * 3))

    for (here, there), expected in zip(asyncio.run(ask_all()), alone * 3, strict=True):
        assert torch.equal(here, expected) and torch.equal(there, expected)


def test_a_recording_sees_the_calls_of_its_thread(composed: Callable[..., Any]) -> None:
    composition, _ = composed("smear")
    model, meeting = composition.model, Barrier(2)

    def record(number: int) -> dict[str, list[Tensor]]:
        with torch.no_grad(), record_routing(model, 2) as found:
            meeting.wait(timeout=60)
            for _ in range(5):
                model(input_ids=some_ids(2, 3 + number, seed=number))
            meeting.wait(timeout=60)
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(record, (0, 1))
    assert first and all(len(calls) == 5 for calls in [*first.values(), *second.values()])
    assert {len(call) for calls in first.values() for call in calls} == {6}
    assert {len(call) for calls in second.values() for call in calls} == {8}
    prompts = ["cat dog", "RED BLUE RED", "cow", "dog RED"]
    alone = [hub.trace(composition, [p], new_tokens=2).weights_MTE for p in prompts]
    jobs = [lambda p=p: hub.trace(composition, [p], new_tokens=2).weights_MTE for p in prompts * 6]
    for found, expected in zip(in_threads(jobs), alone * 6, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("outer", ["smear", "xlora"])
def test_a_model_inside_another_and_inside_itself(composed: Callable[..., Any], outer: str) -> None:
    """A hook of the one runs the other, in the middle of a forward pass."""
    composition, recipe = composed(outer)
    whole = {"base": recipe["base"], "experts": recipe["experts"]}
    other = hub.compose({**whole, "route": {"method": "task"}})
    ids, nested = some_ids(2, 8), some_ids(1, 5, seed=9)

    def read(model: Any, given: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=given).logits
        return logits

    alone = read(composition.model, ids), read(composition.model, nested)
    with other.tasks("expert-1"):
        apart = read(other.model, nested)
    inside: list[Tensor] = []
    running: list[bool] = []

    def run_others(*_: Any) -> None:
        if not running:
            running.append(True)
            inside.append(read(composition.model, nested))
            with pytest.raises(UsageError, match="the model was called without inputs"):
                composition.model.base_model()
            with other.tasks("expert-1"):
                inside.append(read(other.model, nested))
            running.clear()

    handle = composition.model.model.layers[0].mlp.register_forward_hook(run_others)
    found = read(composition.model, ids)
    handle.remove()
    assert torch.equal(found, alone[0])
    for position, one in enumerate(inside):
        assert torch.equal(one, apart if position % 2 else alone[1])


def test_two_routes_by_example_share_a_cache(base_folder: Path, expert_folder: Make) -> None:
    """The decisions of one part do not replace those of the other."""
    parts = [
        {"targets": r".*\.mlp\..*", "route": {"method": "smear"}},
        {"targets": r".*\.self_attn\..*", "route": {"method": "task"}},
    ]
    experts = [{"expert": str(expert_folder(seed)), "weight": 0.2} for seed in range(2)]
    composition = hub.compose({"base": str(base_folder), "experts": experts, "parts": parts})
    ids, model = some_ids(2, 8), composition.model
    seen: list[Any] = []
    smear = model.model.layers[1].mlp.down_proj
    smear.register_forward_hook(lambda m, i, o: seen.append(m.compute_weights(i[0])))
    label = composition.plan.experts[1].label
    with torch.no_grad(), composition.tasks(label):
        out = model(input_ids=ids, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert torch.equal(seen[1][:, 0], seen[0][:, 0])  # The choice of the prompt stays with the row.


def test_gradient_checkpoints_are_refused_where_rows_are_chosen(
    composed: Callable[..., Any],
) -> None:
    composition, _ = composed("smear")
    model = composition.model
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="cannot be used with gradient checkpointing"):
        model(input_ids=some_ids(1, 4))
    model.gradient_checkpointing_disable()
    model(input_ids=some_ids(1, 4))
    with pytest.raises(ValueError, match="run the whole model"):
        model.model.layers[0].mlp.down_proj(torch.randn(1, 3, 48))


def test_sampling_is_that_of_the_seed_in_any_thread(composed: Callable[..., Any]) -> None:
    composition, _ = composed("smear")
    jobs: list[Callable[[], str]] = [
        lambda t=t, p=p: generate_text(composition, p, max_new_tokens=6, temperature=t)
        for p in ("cat", "RED BLUE", "dog cow")
        for t in (0.0, 0.9)
    ]
    alone = [job() for job in jobs]
    assert in_threads(jobs * 6) == alone * 6


def test_a_hidden_progress_bar_comes_back() -> None:
    """Two threads hide it, and the first to begin is the last to end, or the other way round."""
    from experthub.hub.bases.building import hide_progress_bars
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    begun, ended = Barrier(2), Barrier(2)

    def hide() -> None:
        with hide_progress_bars():
            begun.wait(timeout=60)
        ended.wait(timeout=60)

    thread = Thread(target=hide)
    with hide_progress_bars():
        thread.start()
        begun.wait(timeout=60)
        assert not logging.is_progress_bar_enabled()
    ended.wait(timeout=60)
    thread.join()
    assert logging.is_progress_bar_enabled()
