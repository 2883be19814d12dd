"""Arrow against the definition of its prototypes, and against peft's layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits
from experthub import hub
from experthub.hub import trace
from experthub.hub.errors import HubError, UsageError
from experthub.hub.recipes import planned_experts
from experthub.merge import LowRank
from experthub.routing import ExpertStack, Kernel, RoutedLinear, arrow, subtract_general
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Make = Callable[..., Path]
ADAPTER = "adapter_model.safetensors"
KERNELS: tuple[Kernel, ...] = ("all", "gather", "sampled")


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


def peft_adds(x: Tensor, found: dict[int, LowRank], general: Collection[int], **config: Any) -> Any:
    """Compute what peft's layer adds for experts of which some are general."""
    arrow_of_peft = pytest.importorskip("peft.tuners.lora.arrow")
    from peft import ArrowConfig

    settings = ArrowConfig(rng_seed=0, use_gks=bool(general), **config)
    names = {e: f"{'gks' if e in general else 'task'}_{e}" for e in found}
    settings.task_adapter_names = [names[e] for e in found if e not in general]
    settings.gks_adapter_names = [names[e] for e in found if e in general]
    layer = arrow_of_peft.ArrowLoraLinearLayer(24, settings)
    lora_a, lora_b, scaling = nn.ModuleDict(), nn.ModuleDict(), {}
    for e, delta in found.items():
        name = names[e]
        lora_a[name], lora_b[name] = nn.Linear(24, 4, bias=False), nn.Linear(4, 10, bias=False)
        lora_a[name].weight.data, lora_b[name].weight.data = delta.a.clone(), delta.b.clone()
        scaling[name] = delta.scale
    layer.gen_know_sub(lora_a, lora_b)
    layer.build_prototypes(lora_a, lora_b)
    with torch.no_grad():
        return layer(x, lora_a, lora_b, nn.Identity(), scaling)


@pytest.mark.parametrize("general", [(), (4,), (0, 3)])
@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_peft(top_k: int, temperature: float, general: tuple[int, ...]) -> None:
    """The mean factors of general experts are subtracted as in peft."""
    found = experts(5)
    for e in general:
        found[e] = LowRank(found[e].a / 4, found[e].b / 4, found[e].scale)
    top_k = min(top_k, 5 - len(general))
    torch.manual_seed(0)
    base = nn.Linear(24, 10).requires_grad_(False)
    x = torch.randn(2, 7, 24)
    added = peft_adds(x, found, general, top_k=top_k, router_temperature=temperature)
    stack = ExpertStack.of(found, 5)
    stack = subtract_general(stack, general) if general else stack
    router = arrow(stack, top_k=top_k, temperature=temperature)
    for kernel in KERNELS:
        routed = RoutedLinear.from_stack(base, stack, router, kernel=kernel)
        # Processors of other vector widths round the sums in another order.
        torch.testing.assert_close(routed(x), base(x) + added, atol=5e-5, rtol=1e-5)


def test_general_experts_are_no_candidates_and_keep_the_others_places() -> None:
    gates = {e: torch.full((24,), float(e)) for e in range(4)}
    stack = ExpertStack.of(experts(4), 6, gates)
    left = subtract_general(stack, [2, 0])
    assert left.experts == (1, 3) and left.n_experts == 6
    assert left.gates_EI is not None and left.gates_EI[:, 0].tolist() == [1, 3]
    deltas = stack.deltas
    torch.testing.assert_close(left.deltas[3].a, deltas[3].a - (deltas[0].a + deltas[2].a) / 2)
    assert left.deltas[3].scale == deltas[3].scale
    assert torch.equal(deltas[3].a, experts(4)[3].a), "the stack was changed"


@pytest.mark.parametrize("general", [(0, 1, 2), (5,), (0, 5)])
def test_general_experts_that_leave_none_or_are_not_there(general: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"general experts .* found \[0, 1, 2\]"):
        subtract_general(ExpertStack.of(experts(3), 6), general)


def test_general_experts_of_another_rank() -> None:
    deltas = {**experts(2), 2: experts(1, rank=3)[0]}
    with pytest.raises(ValueError, match="one rank"):
        subtract_general(ExpertStack.of(deltas, 3), [2])


@pytest.fixture
def folders(expert_folder: Make) -> dict[str, Path]:
    """Three experts whose first direction stands out, and two small ones; different scales."""
    found = {}
    for e, name in enumerate(("one", "two", "three", "plain", "wide")):
        small = name in ("plain", "wide")
        found[name] = expert_folder(e, size=0.05 if small else 0.2, lora_alpha=3 + e)
        if not small:
            tensors = load_file(found[name] / ADAPTER)
            for key in tensors:
                if "lora_B" in key:
                    tensors[key][:, 0] *= 6
            save_file(tensors, found[name] / ADAPTER)
    return found


def recipe(base: Path, folders: dict[str, Path], **route: Any) -> dict[str, Any]:
    experts = [{"expert": str(folder), "as": name} for name, folder in folders.items()]
    return {"base": str(base), "experts": experts, "route": {"method": "arrow", **route}}


def test_a_recipe_with_general_experts_equals_peft(
    base_folder: Path, base_model: Any, folders: dict[str, Path]
) -> None:
    lora = pytest.importorskip("peft.tuners.lora")
    if not hasattr(lora, "create_arrow_model"):
        pytest.skip("this peft has no Arrow")
    composed = hub.compose(
        recipe(base_folder, folders, top_k=2, gks=["plain", "wide"], kernel="all")
    )
    model = lora.create_arrow_model(
        base_model=base_model,
        task_specific_adapter_paths=[str(folders[name]) for name in ("one", "two", "three")],
        general_adapter_paths=[str(folders[name]) for name in ("plain", "wide")],
        arrow_config=lora.ArrowConfig(top_k=2, use_gks=True, rng_seed=0),
    ).eval()
    torch.testing.assert_close(logits(composed.model), logits(model), atol=1e-5, rtol=1e-5)


def subtracted(folders: dict[str, Path], general: Collection[str], into: Path) -> dict[str, Path]:
    """The other experts written anew, without the mean factors of the general ones."""
    means = [load_file(folders[name] / ADAPTER) for name in general]
    found = {}
    for name, folder in folders.items():
        if name not in general:
            found[name] = into / name
            found[name].mkdir(parents=True)
            config = json.loads((folder / "adapter_config.json").read_text())
            (found[name] / "adapter_config.json").write_text(json.dumps(config))
            tensors = load_file(folder / ADAPTER)
            new = {k: t - torch.stack([m[k] for m in means]).mean(0) for k, t in tensors.items()}
            save_file(new, found[name] / ADAPTER)
    return found


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
def test_a_recipe_subtracts_what_peft_would_write(
    base_folder: Path,
    folders: dict[str, Path],
    tmp_path: Path,
    combine: str,
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
) -> None:
    """Weights of the others are kept, the order of the experts does not matter, nor does a bank."""
    order = {name: folders[name] for name in ("plain", "one", "wide", "two", "three")}
    whole = recipe(base_folder, order, combine=combine, gks=["wide", "plain"])
    whole["experts"][1]["weight"] = 0.5
    alone = subtracted(folders, ("plain", "wide"), tmp_path / "subtracted")
    plain = recipe(base_folder, alone, combine=combine)
    plain["experts"][0]["weight"] = 0.5
    expected = logits(hub.compose(plain).model)
    torch.testing.assert_close(logits(hub.compose(whole).model), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(planned_experts, "LARGE", 1)
    hub.compose(recipe(base_folder, order, combine=combine))  # another bank, of all five
    for _ in range(2):
        found = logits(hub.compose(whole).model)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(list(home.glob("banks/*/experts"))) == 2


def test_what_general_experts_are_part_of(base_folder: Path, folders: dict[str, Path]) -> None:
    """The lock and its digest, only where they are said; and a trace, in which no token chose them."""
    without = hub.compose(recipe(base_folder, folders))
    assert without.lock["route"] == {
        "method": "arrow",
        "combine": "outputs",
        "top_k": 3,
        "temperature": 1.0,
    }
    composed = hub.compose(recipe(base_folder, folders, gks=["plain"]))
    assert composed.lock["route"]["gks"] == ["plain"]
    assert composed.lock["composition"] != without.lock["composition"]
    found = trace(composed, ["hello"])
    assert {module.experts for module in found.modules} == {(0, 1, 2, 4)}
    assert not bool(found.weights_MTE[..., 3].any()) and bool(found.weights_MTE[..., 4].any())


REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[HubError], str]] = [
    ({}, {"gks": ["plane"]}, UsageError, "gks: the recipe has no expert named 'plane'"),
    ({"as": "one"}, {"gks": ["one"]}, UsageError, "gks: the recipe has 2 experts named 'one'"),
    ({}, {"gks": ["one", "two", "three", "plain"]}, UsageError, "so no expert is left to route to"),
    ({"weight": 0.5}, {"gks": ["plain"]}, UsageError, "general expert plain has the weight 0.5"),
    ({"rank": 3}, {"gks": ["plain"]}, HubError, r"gks needs one rank, .* 3 \(plain\), 4 \(three\)"),
    ({"targets": ("q_proj",)}, {"gks": ["plain"]}, HubError, "plain does not adapt .*down_proj"),
    ({}, {"gks": "plain"}, UsageError, "option 'gks': expected list of str | null"),
    ({}, {"gks": [1]}, UsageError, "option 'gks': expected list of str | null"),
    ({}, {"gks": ["plain"], "method": "uniform"}, UsageError, "unknown key 'gks'"),
]


@pytest.mark.parametrize(("last", "route", "error", "words"), REFUSED)
def test_general_experts_that_cannot_be_taken_off(
    base_folder: Path,
    expert_folder: Make,
    last: dict[str, Any],
    route: dict[str, Any],
    error: type[HubError],
    words: str,
) -> None:
    made = {key: last[key] for key in ("rank", "targets") if key in last}
    folders = {name: expert_folder(e) for e, name in enumerate(("one", "two", "three"))}
    whole = recipe(base_folder, folders | {"plain": expert_folder(3, **made)}, **route)
    whole["experts"][3] |= {key: last[key] for key in ("as", "weight") if key in last}
    with pytest.raises(error, match=words) as found:
        hub.compose(whole)
    assert found.type is error  # the exit code follows from it


def test_what_only_general_experts_adapt_and_merges(base_folder: Path, expert_folder: Make) -> None:
    narrow, whole = expert_folder(1, targets=("q_proj",)), expert_folder(2)
    given = recipe(base_folder, {"narrow": narrow, "whole": whole}, gks=["whole"])
    with pytest.raises(HubError, match=r"only general experts adapt .*down_proj"):
        hub.compose(given)
    hub.compose({**given, "targets": r".*\.q_proj"})
    nested = {"merge": {"method": "linear"}, "experts": [str(whole), str(narrow)], "as": "mixed"}
    given["experts"][0] = nested
    with pytest.raises(UsageError, match="mixed is a merge"):
        hub.compose(given)
