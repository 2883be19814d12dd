"""Recipes with parts: other methods for other modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits, run_hub
from experthub import hub
from experthub.hub.errors import HubError, UsageError

MLP, ATTENTION = r".*\.mlp\..*", r".*\.self_attn\..*"


@pytest.fixture
def recipe(base_folder: Path, expert_folder: Callable[..., Path]) -> dict[str, Any]:
    return {"base": str(base_folder), "experts": [str(expert_folder(seed)) for seed in range(3)]}


def of(recipe: dict[str, Any], **ways: Any) -> torch.Tensor:
    return logits(hub.compose({**recipe, **ways}).model)


def test_a_merge_elsewhere(recipe: dict[str, Any]) -> None:
    """A part that routes and one that merges are each what they are alone, at their modules."""
    linear, uniform = {"method": "linear"}, {"method": "uniform"}
    parts = [{"targets": MLP, "route": uniform}, {"targets": ATTENTION, "merge": linear}]
    expected = of(recipe, merge=linear)  # the same function
    torch.testing.assert_close(of(recipe, parts=parts), expected, atol=1e-3, rtol=1e-3)
    one = [{"targets": MLP, "route": {"method": "phatgoose"}}]
    alone = of(recipe, route={"method": "phatgoose"}, targets=MLP)
    assert torch.equal(of(recipe, parts=one), alone)
    both = [*one, {"targets": ATTENTION, "merge": linear}]
    composition = hub.compose({**recipe, "parts": both})
    model = composition.model.model.layers[0]
    assert type(model.mlp.up_proj).__name__ == "RoutedLinear"
    assert type(model.self_attn.q_proj).__name__ == "Linear"
    merged = hub.compose({**recipe, "merge": linear, "targets": ATTENTION}).model
    assert torch.equal(
        model.self_attn.q_proj.weight, merged.model.layers[0].self_attn.q_proj.weight
    )
    assert composition.merged is None
    with pytest.raises(UsageError, match="the weights of a merge have changed"):
        composition.detach()


def test_two_routes_are_detached_and_two_merges_saved(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    routes = [
        {"targets": MLP, "route": {"method": "arrow", "top_k": 1}},
        {"targets": ATTENTION, "route": {"method": "task"}},
    ]
    composition = hub.compose({**recipe, "parts": routes})
    with composition.tasks("expert-1"):
        assert torch.isfinite(logits(composition.model)).all()
    plain = composition.detach()
    assert not any(type(m).__name__ == "RoutedLinear" for m in plain.modules())
    merges = [
        {"targets": MLP, "merge": {"method": "task_arithmetic", "scale": 1.0}},
        {"targets": ATTENTION, "merge": {"method": "linear"}},
    ]
    merged = hub.compose({**recipe, "parts": merges})
    merged.save(tmp_path / "out", format="peft")
    import peft
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(recipe["base"])
    adapted = peft.PeftModel.from_pretrained(loaded, tmp_path / "out")
    torch.testing.assert_close(logits(adapted), logits(merged.model), atol=1e-3, rtol=1e-3)


def test_a_route_over_clusters(recipe: dict[str, Any]) -> None:
    """MBC: experts merged inside of groups, and a router between."""
    one, two, three = recipe["experts"]
    group = {"merge": {"method": "linear"}, "experts": [one, two], "rank": 8, "as": "group"}
    whole = {**recipe, "experts": [group, three]}
    found = of(whole, parts=[{"targets": MLP, "route": {"method": "arrow"}}])
    assert torch.equal(found, of(whole, route={"method": "arrow"}, targets=MLP))


def test_parts_are_planned_locked_and_told(recipe: dict[str, Any], home: Path) -> None:
    parts = [
        {"targets": MLP, "route": {"method": "phatgoose", "top_k": 1}},
        {"targets": ATTENTION, "merge": {"method": "ties"}},
    ]
    Path("parts.yaml").write_text(json.dumps({**recipe, "parts": parts}))
    shown = run_hub("compose", "parts.yaml")
    assert shown.code == 0, shown.err
    said = f"route phatgoose (top_k 1, temperature 1.0): 6 weights that match {MLP}"
    assert said in shown.out
    plan = run_hub("compose", "parts.yaml", "--json").json["plan"]
    assert [set(part) for part in plan["parts"]] == [{"targets", "route"}, {"targets", "merge"}]
    assert len(plan["parameters"]) == 14
    assert run_hub("lock", "parts.yaml").code == 0
    assert run_hub("compose", "parts.yaml", "--frozen").code == 0
    swapped = {**recipe, "parts": parts[::-1]}
    first = hub.compose({**recipe, "parts": parts}).plan.digest
    assert first == plan["digest"] != hub.compose(swapped).plan.digest
    refused = run_hub("compose", "parts.yaml", "--out", "model")
    assert refused.code == 2 and "cannot be written" in refused.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parts": []}, "the list is empty, and needs at least 1 item"),
        ({"parts": [{"targets": MLP}]}, "exactly one of merge, route and parts"),
        ({"parts": [{"merge": {"method": "linear"}}]}, "targets"),
        (
            {"parts": [{"targets": MLP, "merge": {"method": "linear"}}], "targets": MLP},
            "set targets in each of the parts",
        ),
        (
            {
                "parts": [{"targets": MLP, "merge": {"method": "linear"}}],
                "merge": {"method": "linear"},
            },
            "exactly one of merge, route and parts",
        ),
        (
            {
                "parts": [
                    {"targets": r".*up_proj", "merge": {"method": "linear"}},
                    {"targets": MLP, "route": {"method": "uniform"}},
                ]
            },
            "model.layers.0.mlp.up_proj belongs to two parts",
        ),
        ({"parts": [{"targets": "nothing", "merge": {"method": "linear"}}]}, "matches no module"),
        (
            {"parts": [{"targets": MLP, "route": {"method": "retrieval"}}]},
            "a part cannot learn: retrieval",
        ),
        (
            {"parts": [{"targets": MLP, "merge": {"method": "linaer"}}]},
            "unknown merge method 'linaer'",
        ),
        (
            {"parts": [{"targets": MLP, "route": {"method": "uniform"}}], "router": "./r"},
            "parts take no state; remove router:",
        ),
    ],
)
def test_wrong_parts_are_named(recipe: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(HubError, match=words):
        hub.compose({**recipe, **change})
