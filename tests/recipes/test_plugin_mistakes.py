"""Mistakes in the methods of other packages: each is one clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import run_hub
from experthub import hub
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session
from experthub.hub.states.run_state import PROGRESS, run_folder, state_folder
from experthub.hub.states.states import store_state
from experthub.merge import Coefficients, TaskVector, combine, merges
from experthub.routing import Routing, State, Weights, routers
from torch import Tensor

Prepare = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def catalogues() -> Iterator[None]:
    """Forget the methods that a test registers."""
    known = [(catalogue, dict(catalogue._strategies)) for catalogue in (merges, routers)]
    yield
    for catalogue, before in known:
        catalogue._strategies.clear()
        catalogue._strategies.update(before)


def add_router(prepare: Prepare, **more: Any) -> None:
    @routers.register(
        paper="made up",
        prepare=prepare,
        routing=Routing("example", "model"),
        needs=("data",),
        **more,
    )
    def peek(pool: Any) -> Any:
        """Give every expert the same weight."""
        return lambda batch: Weights(torch.ones(len(batch.texts), 2) / 2)


def add_merge(prepare: Prepare) -> None:
    @merges.register(paper="made up", prepare=prepare, needs=("data",))
    def toy(vectors: list[TaskVector], weights: Tensor, state: Any) -> TaskVector:
        """Sum the task vectors."""
        return combine(vectors, weights)


@pytest.fixture
def recipe(base_folder: Path, expert_folder: Callable[..., Path], tiny_task: str) -> dict[str, Any]:
    experts = [str(expert_folder(1)), str(expert_folder(2))]
    return {"base": str(base_folder), "experts": experts, "data": {"tasks": [tiny_task]}}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, "NoneType, expected State"),
        ({"a": torch.ones(1)}, "dict, expected State"),
        (State({"a": [1, 2]}), "a as list, expected torch.float32 or torch.int64"),  # type: ignore[dict-item]
        (State({"a": torch.ones(1).double()}), "a as torch.float64, expected"),
        (State({"a": torch.tensor([float("nan")])}), "NaN or infinity in a"),
    ],
)
@pytest.mark.parametrize("keeps_state", [True, False])
def test_a_router_that_prepares_no_state(
    recipe: dict[str, Any], made: Any, words: str, keeps_state: bool
) -> None:
    add_router(lambda materials, options: made, keeps_state=keeps_state)
    with pytest.raises(UsageError, match=f"peek: prepare returned {words}") as caught:
        hub.compose(recipe | {"route": {"method": "peek"}})
    assert caught.value.hint == "correct the method's prepare function"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (torch.ones(2), "Tensor, expected Coefficients"),
        (
            Coefficients(torch.ones(3, 1).double(), ("model",), "task"),
            "coefficients of 3 experts, and the recipe has 2",
        ),
    ],
)
def test_a_merge_that_prepares_no_coefficients(
    recipe: dict[str, Any], made: Any, words: str
) -> None:
    add_merge(lambda materials, options: made)
    with pytest.raises(UsageError, match=f"toy: prepare returned {words}"):
        hub.compose(recipe | {"merge": {"method": "toy"}})


def test_tensors_of_a_state_may_share_memory(recipe: dict[str, Any]) -> None:
    shared = torch.ones(3)
    add_router(lambda materials, options: State({"a": shared, "b": shared}))
    state = hub.compose(recipe | {"route": {"method": "peek"}}).state
    assert torch.equal(state.tensors["a"], state.tensors["b"])


def test_labels_are_for_routers_that_ask_for_them(recipe: dict[str, Any]) -> None:
    route = recipe | {"route": {"method": "peek"}}
    add_router(lambda materials, options: materials.read_answers())
    with pytest.raises(UsageError, match="peek reads labels that it does not ask for"):
        hub.compose(route)
    seen: list[Any] = []

    def compose(materials: Any, options: Any) -> State:
        seen.append(materials.compose({}).labels)
        return State()

    routers._strategies.pop("peek")
    add_router(compose)
    hub.compose(route)
    routers._strategies.pop("peek")
    add_router(compose, needs_labels=lambda options: True, keeps_state=False)
    hub.compose(route | {"data": {**recipe["data"], "labels": True}})
    assert seen[0] is None and len(seen[1]) == 1


def test_a_method_that_returns_something_else(recipe: dict[str, Any]) -> None:
    @merges.register(paper="made up")
    def nothing(vectors: list[TaskVector], weights: Tensor) -> None:
        """Return nothing."""

    @routers.register(paper="made up")
    def nowhere(stack: Any) -> None:
        """Return nothing."""

    plain = {key: value for key, value in recipe.items() if key != "data"}
    with pytest.raises(HubError, match="nothing: returned NoneType, expected a TaskVector"):
        hub.compose(plain | {"merge": {"method": "nothing"}})
    with pytest.raises(HubError, match="returned NoneType, expected a router"):
        hub.compose(plain | {"route": {"method": "nowhere"}})


def test_a_damaged_state_of_an_earlier_run_can_be_made_again(recipe: dict[str, Any]) -> None:
    add_router(lambda materials, options: State({"a": torch.ones(1)}))
    plan = resolve(hub.Recipe.of(recipe | {"route": {"method": "peek"}}), session=Session())
    hub.compose(plan)
    folder = state_folder(plan)

    def check_hints() -> None:
        for use in (lambda: hub.compose(plan), lambda: store_state(plan, Session())):
            with pytest.raises(IntegrityError) as caught:
                use()
            assert caught.value.hint == f"remove {folder} to make the state again"

    (folder / "router.json").write_text("{")
    check_hints()
    for file in folder.iterdir():
        file.unlink()
    check_hints()


def test_damaged_progress_is_named(recipe: dict[str, Any]) -> None:
    plan = resolve(hub.Recipe.of(recipe | {"merge": {"method": "adamerging"}}), session=Session())
    run_folder(plan).mkdir(parents=True)
    (run_folder(plan) / PROGRESS).write_bytes(b"xx")
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        hub.compose(plan)
    assert caught.value.hint == "remove it to start the run again"


def test_a_named_state_of_other_experts_is_not_shown(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    made = recipe | {"merge": {"method": "adamerging", "steps": 1}}
    other = {key: value for key, value in made.items() if key != "data"}
    other |= {"experts": recipe["experts"][::-1], "coefficients": "mine"}
    for name, value in (("made", made), ("other", other)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(value))
    ran = run_hub("coefficients", tmp_path / "made.yaml", "--name", "mine")
    assert ran.code == 0, ran.err
    ran = run_hub("coefficients", tmp_path / "other.yaml")
    assert ran.code == 2 and "was made for" in ran.err
