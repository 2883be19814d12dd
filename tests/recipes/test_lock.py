"""Locks: a recipe keeps its meaning while registries, folders and recipes around it change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub
from experthub import hub
from experthub.hub.errors import ConflictError, IntegrityError, NotFoundError, UsageError
from experthub.hub.files import yaml_files
from experthub.hub.recipes.lock import lock, plan_of
from experthub.hub.recipes.lock_file import Lock, lock_path
from experthub.hub.session import Session
from experthub.hub.store.roots import list_lock_files, read_locked_digests, remember_lock

Make = Callable[..., Path]
RECIPE = Path("recipe.yaml")


def write_recipe(base: str, *experts: Any, **more: Any) -> None:
    value = {"base": base, "experts": list(experts), "merge": {"method": "linear"}} | more
    RECIPE.write_text(yaml_files.dump(value))


@pytest.fixture
def project(base_folder: Path, expert_folder: Make) -> list[Path]:
    """A project with a base, two experts and a recipe of them."""
    folders = [Path(shutil.copytree(expert_folder(i, size=0.2), f"experts/{i}")) for i in (1, 2)]
    shutil.copytree(base_folder, "base")
    Path("registry.yaml").write_text("version: 1\nbases: {tiny: {sources: ['file:base']}}\n")
    for name, folder in zip(("one", "two"), folders, strict=True):
        ran = run_hub("add", folder, "--name", name, "--registry", "registry.yaml")
        assert ran.code == 0, ran.err
    write_recipe("tiny", "one", {"expert": "two@1", "weight": 2})
    return folders


def newer(folder: Path, name: str = "one") -> None:
    """Register another content as the name's next version."""
    assert run_hub("add", folder, "--name", name, "--version", "2").code == 0
    text = Path("registry.yaml").read_text()
    entry = run_hub("show", f"{name}@2", "--json").json["expert"]
    kept = {key: entry[key] for key in ("name", "version", "base", "sources", "digest")}
    document = yaml_files.parse(text, "registry.yaml").value
    document["experts"].append(kept)
    Path("registry.yaml").write_text(yaml_files.dump(document))


def weights(plan: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = hub.compose(plan).model.state_dict()
    return state


def same_bits(a: Any, b: Any) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_a_lock_pins_everything(project: list[Path]) -> None:
    ran = run_hub("lock", "recipe.yaml")
    assert ran.code == 0, ran.err
    held, plan = Lock.read(lock_path(RECIPE)), plan_of(RECIPE)
    assert [m.expert for m in held.members] == ["one@1", "two@1"]
    assert [m.digest for m in held.members] == [m.digest for m in plan.members]
    assert held.base.fingerprint == plan.base.fingerprint and held.composition == plan.digest
    text = lock_path(RECIPE).read_text()
    assert "file:experts/1" in text and "file:base" in text and str(Path.cwd()) not in text


def test_the_same_bits_after_a_newer_version(project: list[Path], expert_folder: Make) -> None:
    before = plan_of(RECIPE)
    run_hub("lock", "recipe.yaml")
    newer(expert_folder(3, size=0.2))
    assert plan_of(RECIPE).digest != before.digest
    for pins in ("locked", "frozen"):
        plan = plan_of(RECIPE, pins)  # type: ignore[arg-type]
        assert plan.digest == before.digest and same_bits(plan, before)
    assert run_hub("lock", "--check", "recipe.yaml").code == 0
    text = lock_path(RECIPE).read_text()
    assert run_hub("lock", "recipe.yaml").code == 0
    assert lock_path(RECIPE).read_text() == text, "what is pinned stays"


def test_update_moves_one_expert(project: list[Path], expert_folder: Make) -> None:
    run_hub("lock", "recipe.yaml")
    newer(expert_folder(3, size=0.2))
    newer(expert_folder(4, size=0.2), "two")
    ran = run_hub("update", "one", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["locks"][0]["path"] == "recipe.lock.yaml"
    assert [m.expert for m in Lock.read(lock_path(RECIPE)).members] == ["one@2", "two@1"]
    assert run_hub("update", "two").code == 0, "two@1 is what the recipe says"
    assert [m.expert for m in Lock.read(lock_path(RECIPE)).members] == ["one@2", "two@1"]


def test_upgrade_moves_all(project: list[Path], expert_folder: Make) -> None:
    write_recipe("tiny", "one", "two")
    run_hub("lock", "recipe.yaml")
    newer(expert_folder(3, size=0.2))
    newer(expert_folder(4, size=0.2), "two")
    assert run_hub("lock", "recipe.yaml", "--upgrade").code == 0
    assert [m.expert for m in Lock.read(lock_path(RECIPE)).members] == ["one@2", "two@2"]


def test_frozen_needs_no_registry_and_no_store(project: list[Path], home: Path) -> None:
    run_hub("lock", "recipe.yaml")
    before = plan_of(RECIPE)
    bits = weights(before)
    Path("registry.yaml").unlink()
    shutil.rmtree(home)
    with pytest.raises(NotFoundError):
        plan_of(RECIPE, "locked")
    plan = plan_of(RECIPE, "frozen")
    assert plan.digest == before.digest
    assert all(torch.equal(bits[n], t) for n, t in weights(plan).items())


def test_a_project_can_move(project: list[Path], tmp_path: Path) -> None:
    run_hub("lock", "recipe.yaml")
    before = plan_of(RECIPE).digest
    moved = tmp_path / "elsewhere"
    shutil.copytree(Path.cwd(), moved)
    shutil.rmtree("experts")
    assert plan_of(moved / "recipe.yaml", "frozen").digest == before


def test_layout_and_comments_do_not_count(project: list[Path]) -> None:
    run_hub("lock", "recipe.yaml")
    RECIPE.write_text("# a comment\n\n" + RECIPE.read_text())
    assert run_hub("lock", "--check", "recipe.yaml").code == 0


@pytest.mark.parametrize("words", [("compose", "recipe.yaml"), ("lock", "--check", "recipe.yaml")])
def test_a_changed_recipe_is_refused(project: list[Path], words: tuple[str, ...]) -> None:
    run_hub("lock", "recipe.yaml")
    write_recipe("tiny", "one", {"expert": "two@1", "weight": 3})
    locked = [*words, "--locked"] if words[0] == "compose" else words
    ran = run_hub(*locked)
    assert ran.code == 6
    assert ran.err == (
        "error: recipe.yaml has changed since it was locked\nhint: run hub lock recipe.yaml\n"
    )
    assert run_hub("lock", "recipe.yaml").code == 0
    assert run_hub(*locked).code == 0


def test_a_changed_registry_is_refused_unless_frozen(project: list[Path]) -> None:
    run_hub("lock", "recipe.yaml")
    path = Path("registry.yaml")
    digest = Lock.read(lock_path(RECIPE)).members[0].digest
    path.write_text(path.read_text().replace(digest, "sha256:" + "0" * 64))
    shutil.rmtree("../home/registry", ignore_errors=True)
    with pytest.raises(ConflictError, match="one@1 is sha256:000000000000 now"):
        plan_of(RECIPE, "locked")
    assert plan_of(RECIPE, "frozen").members[0].digest == digest


def test_a_changed_base_is_refused(project: list[Path], base_folder: Path) -> None:
    from conftest import tiny_llama

    run_hub("lock", "recipe.yaml")
    shutil.rmtree("base")
    tiny_llama(Path("base"), seed=9)
    with pytest.raises(ConflictError, match="its lock says"):
        plan_of(RECIPE, "locked")
    with pytest.raises(IntegrityError, match="its weights are"):
        plan_of(RECIPE, "frozen")


def test_a_changed_source_is_refused(project: list[Path], home: Path, expert_folder: Make) -> None:
    run_hub("lock", "recipe.yaml")
    shutil.rmtree(home)
    shutil.rmtree(project[0])
    shutil.copytree(expert_folder(7), project[0])
    with pytest.raises(IntegrityError, match=r"experts/1 is sha256:.*, expected sha256:"):
        plan_of(RECIPE, "frozen")


def test_folders_and_nested_merges_are_locked(project: list[Path]) -> None:
    nested = {"merge": {"method": "linear"}, "experts": ["one", "./experts/2"], "as": "both"}
    write_recipe("./base", nested, "two")
    assert run_hub("lock", "recipe.yaml").code == 0
    held = Lock.read(lock_path(RECIPE))
    assert len(held.members) == 3 and len(held.experts) == 2
    plan = plan_of(RECIPE, "frozen")
    assert plan.digest == held.composition == plan_of(RECIPE).digest


def test_the_lock_of_a_composition_is_that_of_its_file(project: list[Path]) -> None:
    run_hub("lock", "recipe.yaml")
    document = yaml_files.read(lock_path(RECIPE)).value
    composed = hub.compose(RECIPE).lock
    assert {*document} - {*composed} == {"recipe"}
    assert document["composition"] == composed["composition"]


def test_eval_and_generate_take_pins(
    project: list[Path], tiny_task: str, expert_folder: Make
) -> None:
    run_hub("lock", "recipe.yaml")
    before = plan_of(RECIPE).digest
    newer(expert_folder(3, size=0.2))
    ran = run_hub("eval", "recipe.yaml", "--tasks", tiny_task, "--limit", "4", "--frozen", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["recipes"]["recipe"]["digest"] == before
    ran = run_hub("generate", "recipe.yaml", "--prompt", "a", "--locked", "--json")
    assert ran.code == 0 and ran.json["recipe"] == before
    assert run_hub("generate", "recipe.yaml", "--prompt", "a", "--json").json["recipe"] != before


def test_nothing_is_written_when_one_recipe_fails(project: list[Path]) -> None:
    Path("bad.yaml").write_text("base: tiny\nexperts: [none]\nmerge: {method: linear}\n")
    assert run_hub("lock", "recipe.yaml", "bad.yaml").code == 4
    assert not list(Path().glob("*.lock.yaml"))


def test_errors(project: list[Path]) -> None:
    ran = run_hub("compose", "recipe.yaml", "--locked")
    assert ran.code == 4 and "there is no lock recipe.lock.yaml" in ran.err
    assert "hub lock" in ran.err
    assert run_hub("compose", "recipe.yaml", "--locked", "--frozen").code == 2
    assert run_hub("update", "one").code == 4
    run_hub("lock", "recipe.yaml")
    path = lock_path(RECIPE)
    path.write_text(path.read_text().replace("digest:", "digst:", 1))
    ran = run_hub("compose", "recipe.yaml", "--frozen")
    assert ran.code == 2 and "recipe.lock.yaml, line" in ran.err and "'digst'" in ran.err
    with pytest.raises(UsageError):
        lock(Path("recipe.yaml"), Session())


def test_update_finds_a_recipe_by_either_suffix(project: list[Path]) -> None:
    RECIPE.rename("recipe.yml")
    assert run_hub("lock", "recipe.yml").code == 0
    newer(project[0])
    ran = run_hub("update", "one")
    assert ran.code == 0, ran.err
    assert "one@2" in lock_path(RECIPE).read_text()
    ran = run_hub("update", "three")
    assert ran.code == 4 and "hint: run hub update three RECIPE" in ran.err


def test_a_lock_under_a_path_of_any_bytes(home: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9\n")
    place.mkdir()
    path = place / "x.lock.yaml"
    path.write_text("experts: [{digest: sha256:ab}]\n")
    remember_lock(path)
    assert list_lock_files(home) == [path.resolve()]
    assert read_locked_digests(home) == {"sha256:ab"}


def test_the_label_of_a_folder(project: list[Path]) -> None:
    """An @ in the path belongs to the path."""
    folder = Path(shutil.copytree(project[0], "a@b/mine"))
    write_recipe("tiny", str(folder.absolute()), "one@1", "two")
    assert [expert.label for expert in plan_of(RECIPE).experts] == ["mine", "one", "two"]
