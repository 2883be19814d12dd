"""Recipes, locks, states and outputs stay what they were when they were frozen.

`frozen/home.tar.xz` is a store that an earlier version wrote, `frozen/recipes/` has a recipe for
every method and way to compose, and the rest of `frozen/` is what that version gave for them.
Digests, locks and what commands print of them hold everywhere.  Bits are compared where torch, the
processor's capability and the number of threads are those of the goldens; elsewhere outputs are
compared within a tolerance.  `frozen/make.py` says how the goldens were made.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experthub import hub
from experthub.hub.recipes import lock
from frozen.cases import (
    ALONE,
    COMMANDS,
    GOLDENS,
    LOCKS,
    OUTPUTS,
    RECIPES,
    Found,
    Observer,
    command,
    inside,
    sha256,
    surroundings,
    unpack,
    without_bits,
)
from safetensors.torch import load_file

FROZEN: dict[str, Any] = json.loads(GOLDENS.read_text())
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
GROWING = ("methods", "list", "list-bases", "show-base")  # later versions may know more
# These are computed from logits. Logits are computed only where a text is scored since version 1,
# and products of another shape are rounded otherwise.
SCORED = re.compile("adamerging|atlas|fisher|lorahub|xlora|eval-|suggest-|coefficients-")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LOOSE = {"atol": 1e-4, "rtol": 1e-4}  # between kernels, which round differently, and of long sums
HALF = {"atol": 0.1, "rtol": 0.1}  # of models in half precision


def pins_a_state(name: str) -> bool:
    """Say whether a lock pins a state that was made where the goldens were made."""
    return "/home/runs/" in (LOCKS / f"{name}.lock.yaml").read_text()


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    """Return the outputs that were frozen."""
    found: dict[str, torch.Tensor] = load_file(OUTPUTS)
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the frozen store, for what does not get into each other's way."""
    return unpack(tmp_path_factory.mktemp("frozen") / "project")


@pytest.fixture(scope="module")
def observer(project: Path) -> Observer:
    """Return what composes the recipes of the store."""
    with inside(project):
        return Observer(project)


@pytest.fixture
def placed(project: Path) -> Iterator[Path]:
    """Stand in the store's folder."""
    with inside(project):
        yield project


def gives_same_bits(name: str) -> bool:
    """Say whether a recipe or a command gives the same bits here as where the goldens were made."""
    return bool(surroundings() == FROZEN["surroundings"]) and not SCORED.search(name)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_composed_as_it_was(
    name: str, placed: Path, observer: Observer, outputs: dict[str, torch.Tensor]
) -> None:
    found, frozen = observer.recipe(name), FROZEN["recipes"][name]
    assert found.always == frozen["always"]
    assert found.exact == frozen["exact"]
    check_lock(name, found)
    here = gives_same_bits(name)
    check_tokenizer(name, found, placed)
    if here and found.exact:
        if has_other_digest(found):
            frozen["here"]["state"].pop("digest", None)
        assert found.here == frozen["here"]
    for key, tensor in found.tensors.items():
        expected = outputs[f"{name}.{key}"]
        if here and found.exact:
            assert torch.equal(tensor, expected)
        else:
            torch.testing.assert_close(tensor, expected, **tolerance(name, found))


def tolerance(name: str, found: Found) -> dict[str, float]:
    """Return how far outputs may be from the frozen ones where bits are not compared."""
    if name.endswith("float16"):
        return HALF
    exact = found.exact and not name.startswith("bank") and not SCORED.search(name)
    return TOLERANCE if exact else LOOSE


def check_tokenizer(name: str, found: Found, placed: Path) -> None:
    """Check that the tokenizer's settings were exported as the base has them, byte for byte.

    The version that was frozen read them and wrote them again.
    """
    if written := found.here.get("saved as hf"):
        base = Path(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["base"]).name
        settings = placed / "bases" / base / "tokenizer_config.json"
        assert written.pop("tokenizer_config.json") == sha256(settings.read_bytes())
        del FROZEN["recipes"][name]["here"]["saved as hf"]["tokenizer_config.json"]


def has_other_digest(found: Found) -> bool:
    """Say whether a state that was made now has another digest than in version 1."""
    return "digest" not in found.here.get("state", {"digest": None})


def check_lock(name: str, found: Found) -> None:
    """Compare a lock byte for byte; the digest of what was learned just now depends on bits."""
    lock = (LOCKS / f"{name}.lock.yaml").read_text()
    if has_other_digest(found) or ("state" in found.here and not gives_same_bits(name)):
        assert found.lock is not None
        assert without_seal(without_bits(found.lock)) == without_seal(without_bits(lock))
    else:
        assert found.lock == lock


def without_seal(lock: str) -> str:
    """Return a lock without its last line, the digest of the lines above it."""
    return "".join(line for line in lock.splitlines(keepends=True) if not line.startswith("#"))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_says_what_it_said(name: str, project: Path, tmp_path: Path) -> None:
    own = unpack(tmp_path / "project") if name.startswith(ALONE) else project
    with inside(own):
        found, frozen = command(name, own), FROZEN["commands"][name]
        here = gives_same_bits(name)
    if name == "methods":
        drop_descriptions(frozen["always"]["printed"])
        drop_descriptions(found.always["printed"])
    for part in (found.always, frozen["always"]):  # Later versions may estimate better.
        part.get("printed", {}).get("plan", {}).pop("memory_bytes", None)
    if name in GROWING:
        check_known(frozen["always"]["printed"], found.always["printed"])
    else:
        assert found.always == frozen["always"]
    for part in (found.here, frozen["here"]):
        if part.get("printed", {}).get("embedder"):  # It is named by its digest now.
            part["printed"].pop("digest")
    # The keys of cached scores depend on versions, and on the base's digest.
    assert len(found.here.pop("results", [])) == len(frozen["here"].pop("results", []))
    if here:
        assert found.here == frozen["here"]
    else:
        check_near(frozen["here"].get("printed"), found.here.get("printed"))


def drop_descriptions(printed: Any) -> None:
    """Remove the descriptions of options: later versions may word them differently."""
    for method in printed["methods"]:
        for option in method["options"].values():
            option.pop("description", None)


def check_known(frozen: Any, found: Any) -> None:
    """Check that all items that were listed still are."""
    for key, items in frozen.items():
        if isinstance(items, dict):
            check_known(items, found[key])
        elif isinstance(items, list):
            missing = [item for item in items if item not in found[key]]
            assert not missing
        else:
            assert found[key] == items


def check_near(frozen: Any, found: Any) -> None:
    """Compare plain values, numbers within a tolerance, and no digests of what was learned."""
    if isinstance(frozen, dict):
        assert frozen.keys() == found.keys()
        for key in frozen:
            check_near(frozen[key], found[key])
    elif isinstance(frozen, list):
        assert len(frozen) == len(found)
        for one, other in zip(frozen, found, strict=True):
            check_near(one, other)
    elif isinstance(frozen, float):
        assert math.isclose(frozen, found, rel_tol=1e-3, abs_tol=1e-4)
    elif not (isinstance(frozen, str) and re.search(r"[0-9a-f]{12}", frozen)):
        assert frozen == found


@pytest.mark.parametrize("name", [name for name in NAMES if not pins_a_state(name)])
def test_a_lock_of_version_1_is_read(
    name: str, placed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (LOCKS / f"{name}.lock.yaml").read_text()
    if "<project>" in text:  # Such a lock names a folder of the machine where it was made.
        text = without_seal(text).replace("<project>", str(placed))
    locked = placed / "earlier.lock.yaml"
    locked.write_text(text)
    monkeypatch.setattr(lock, "lock_path", lambda _: locked)
    said: list[str] = []
    session = hub.Session(report=lambda what, *_: said.append(what))
    plan = hub.plan_of(f"{name}.yaml", "frozen", session=session)
    assert plan.weights_digest == FROZEN["recipes"][name]["always"]["digest"]
    assert any("covers the weights of" in one for one in said)


def test_every_method_has_a_recipe() -> None:
    texts = [yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in NAMES]
    used = {
        (kind, part[kind]["method"])
        for recipe in texts
        for part in recipe.get("parts", [recipe])
        for kind in ("merge", "route")
        if kind in part
    }
    listed = FROZEN["commands"]["methods"]["always"]["printed"]["methods"]
    assert {(method["kind"], method["name"]) for method in listed} == used
