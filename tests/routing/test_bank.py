"""Banks: experts packed once into mapped files, and composed from there."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits, run_hub
from experthub import hub
from experthub.hub.composition import bank, stacking
from experthub.hub.errors import IntegrityError
from experthub.hub.formats.mapped_tensors import TensorsWriter
from experthub.hub.recipes import planned_experts
from safetensors.torch import load_file, save_file

ROUTES: list[dict[str, Any]] = [
    {"method": "phatgoose"},
    {"method": "arrow"},
    {"method": "smear", "combine": "outputs"},
    {"method": "uniform"},
    {"method": "task"},
]


@pytest.fixture
def recipe(base_folder: Path, expert_folder: Callable[..., Path]) -> dict[str, Any]:
    """Three experts of different ranks, one of which adapts fewer modules."""
    folders = [expert_folder(0), expert_folder(1, rank=2), expert_folder(2, targets=("q_proj",))]
    return {"base": str(base_folder), "experts": [str(folder) for folder in folders]}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(planned_experts, "LARGE", 1)
    yield


def folders(home: Path) -> list[Path]:
    return sorted(path for path in home.glob("banks/*/*") if path.parent.name != "members")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: str(route["method"]))
def test_a_bank_gives_what_the_experts_give(
    recipe: dict[str, Any], route: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {**recipe, "route": route}
    without = hub.compose(whole)
    assert not folders(home)
    monkeypatch.setattr(planned_experts, "LARGE", 1)
    made = hub.compose(whole)
    assert len(folders(home)) == 2

    def refuse(*_: Any) -> None:
        raise AssertionError("the experts are read again")

    monkeypatch.setattr(stacking, "load_task_vector", refuse)
    again = hub.compose(whole)
    with made.tasks(["x"]), without.tasks(["x"]), again.tasks(["x"]):
        expected = logits(without.model)
        torch.testing.assert_close(logits(made.model), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(made.model), logits(again.model))


def test_routers_share_the_packed_experts(recipe: dict[str, Any], home: Path, always: None) -> None:
    for top_k in (1, 2):
        hub.compose({**recipe, "route": {"method": "phatgoose", "top_k": top_k}})
    names = [path.name.partition("-")[0] for path in folders(home)]
    assert names == ["experts", "router", "router"]
    index = json.loads((folders(home)[1] / "index.json").read_bytes())
    # Not by the private module, which may be renamed.
    assert index["parts"][0]["settings"]["class"] == ["experthub.routing", "TopK"]
    hub.compose({**recipe, "experts": recipe["experts"][:2], "route": {"method": "arrow"}})
    assert len(folders(home)) == 5
    half = {**recipe, "dtype": "bfloat16", "route": {"method": "arrow"}}
    assert torch.isfinite(logits(hub.compose(half).model)).all()


def test_a_bank_that_is_removed_or_damaged(
    recipe: dict[str, Any], home: Path, always: None
) -> None:
    whole = {**recipe, "route": {"method": "phatgoose"}}
    first = logits(hub.compose(whole).model)
    shutil.rmtree(home / "banks")
    assert torch.equal(logits(hub.compose(whole).model), first)
    (experts, routers) = folders(home)
    shutil.rmtree(experts)  # what is left is not used with what is made anew
    assert torch.equal(logits(hub.compose(whole).model), first)
    (experts, routers) = folders(home)
    for folder, name, damage in product(
        (experts, routers),
        ("tensors.bin", "index.json"),
        (b"", b"\0" * 40, b"[]", b'{"parts": [1]}'),
    ):
        good = (folder / name).read_bytes()
        (folder / name).unlink()  # what is mapped keeps its own
        (folder / name).write_bytes(damage)
        with pytest.raises(IntegrityError, match=r"bank .* is damaged"):
            hub.compose(whole)
        (folder / name).write_bytes(good)
    assert torch.equal(logits(hub.compose(whole).model), first)


def test_verify_finds_a_flipped_bit(recipe: dict[str, Any], home: Path, always: None) -> None:
    whole = {**recipe, "route": {"method": "phatgoose"}}
    first = logits(hub.compose(whole).model)
    assert run_hub("verify").code == 0
    for folder, name in product(folders(home), ("tensors.bin", "index.json", "files.yaml")):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).unlink()  # what is mapped keeps its own
        (folder / name).write_bytes(content)
        ran = run_hub("verify", "--json")
        found = {str(folder.relative_to(home)): [name]}
        assert ran.code == 3 and ran.json["verify"]["folders"] == found
        ran = run_hub("verify", "--repair", "--json")
        assert ran.code == 0 and ran.json["verify"]["repaired"] == [*found]
        assert not folder.exists() and run_hub("verify").code == 0
        assert torch.equal(logits(hub.compose(whole).model), first)


def test_nothing_is_left_of_an_interrupted_bank(
    recipe: dict[str, Any], home: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {**recipe, "route": {"method": "phatgoose"}}
    put, count = TensorsWriter.put, 0

    def stop(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        put(*arguments)

    monkeypatch.setattr(TensorsWriter, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        hub.compose(whole)
    assert not folders(home)
    hub.compose(whole)
    assert len(folders(home)) == 2


def test_what_is_packed_needs_no_store(recipe: dict[str, Any], home: Path, always: None) -> None:
    """Experts are known again by one file; whatever is not in a bank is asked of the store as ever."""
    for number, folder in enumerate(recipe["experts"]):
        assert run_hub("add", folder, "--name", f"e{number}").code == 0
    whole = {**recipe, "experts": ["e0", "e1", "e2"], "route": {"method": "phatgoose"}}
    made = hub.compose(whole)
    (known,) = home.glob("banks/members/*.json")
    shutil.rmtree(home / "objects")
    again = hub.compose(whole)
    assert not (home / "objects").exists()
    assert again.lock == made.lock and again.plan.members == made.plan.members
    assert torch.equal(logits(again.model), logits(made.model))
    for change in ({"dtype": "bfloat16"}, {"route": {"method": "arrow"}, "targets": ".*q_proj"}):
        hub.compose({**whole, **change})  # another bank: pulled again
        shutil.rmtree(home / "objects")
    hub.compose({**recipe, "experts": ["e0", "e1", "e2"], "merge": {"method": "linear"}})
    shutil.rmtree(home / "objects")
    text = known.read_text()
    for damaged in ("", "{", "[]", "{}", text.replace("q_proj", "v_proj", 1)):
        known.write_text(damaged)
        assert hub.compose(whole).plan.members == made.plan.members
        assert known.read_text() == text, "written anew"


def test_halves_stay_halves_and_gates_are_prefiltered(
    base_folder: Path,
    expert_folder: Callable[..., Path],
    home: Path,
    always: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bank, "MIN_PREFILTERED_EXPERTS", 2)
    for coarse in ("Bfloat16Probes", "Int8Probes"):
        monkeypatch.setattr(f"experthub.routing.kernels.prefilter.{coarse}.candidates", 2)
    experts = [str(halved(expert_folder(seed))) for seed in range(6)]
    whole = {"base": str(base_folder), "experts": experts, "dtype": "float32"}
    for method in ("phatgoose", "arrow"):
        route = {"method": method, "top_k": 1}
        packed = hub.compose({**whole, "route": {**route, "kernel": "prefilter"}})
        groups = [m.group.packed for m in packed.model.modules() if hasattr(m, "group")]
        assert all(
            g.prefilter.bfloat16.rows.dtype == g.a.matrix.dtype == torch.bfloat16 for g in groups
        )
        assert all(g.prefilter.int8.rows.dtype == torch.int8 for g in groups)
        assert all(g.probes.dtype == torch.float32 for g in groups)
        monkeypatch.setattr(planned_experts, "LARGE", 1 << 60)
        stacked = hub.compose({**whole, "route": {**route, "kernel": "all"}})
        monkeypatch.setattr(planned_experts, "LARGE", 1)
        torch.testing.assert_close(
            logits(packed.model), logits(stacked.model), atol=1e-4, rtol=1e-4
        )


def halved(folder: Path) -> Path:
    """The expert with its weights in bfloat16."""
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    return folder


def age(paths: list[Path], days: float) -> None:
    for path in paths:
        os.utime(path, (time.time() - days * 86400,) * 2)


def collected(home: Path, *options: str) -> list[Path]:
    """Return the leftovers that `hub gc` deletes."""
    ran = run_hub("gc", "--json", "--yes", *options)
    assert ran.code == 0, ran.err
    return sorted(home / name for name in ran.json["gc"]["leftovers"])


def test_a_bank_is_collected_when_it_was_not_used_for_a_week(
    recipe: dict[str, Any], home: Path, always: None
) -> None:
    routed = [{**recipe, "route": {"method": "arrow", "top_k": top_k}} for top_k in (1, 2)]
    first = logits(hub.compose(routed[0]).model)
    hub.compose(routed[1])
    age(folders(home), days=6.9)
    assert len(folders(home)) == 3 and not collected(home)
    age(folders(home), days=7.1)
    everything = folders(home)
    assert collected(home, "--dry-run") == everything == folders(home)
    held = hub.compose(routed[0])  # a use: its router and the experts count as new
    (other,) = collected(home)
    assert other.name.startswith("router-") and folders(home) == sorted({*everything} - {other})
    known = list(home.glob("banks/members/*"))
    age([*folders(home), *known], days=7.1)
    assert collected(home) == sorted({*everything, *known} - {other})
    assert not list((home / "banks").iterdir())
    assert torch.equal(logits(held.model), first), "what is mapped stays readable"
    assert torch.equal(logits(hub.compose(routed[0]).model), first)


def test_a_bank_that_is_half_written_or_half_removed_is_no_bank(
    recipe: dict[str, Any], home: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {**recipe, "route": {"method": "arrow"}}
    first = logits(hub.compose(whole).model)
    age(folders(home), days=8)
    with monkeypatch.context() as patched:  # killed while it removes
        patched.setattr("experthub.hub.files.atomic.remove", lambda _: None)
        collected(home)
    left = folders(home)
    assert left and all(path.name.startswith(".") for path in left)
    assert collected(home) == left and not folders(home)
    assert torch.equal(logits(hub.compose(whole).model), first)
    assert [path.name.partition("-")[0] for path in folders(home)] == ["experts", "router"]
