"""Registries and tasks that another user put into a folder in which the hub looks for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_hub
from experthub.hub.errors import UsageError
from experthub.hub.files.ownership import UnsafeFileWarning, find_danger
from experthub.hub.registry.registry import Registry
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import read_task, tasks_folder, write_task

pytestmark = pytest.mark.attack
ENTRY = {"name": "planted", "version": 1, "base": "b", "sources": ["hf:evil/x"]}
ENTRY["digest"] = "sha256:" + "0" * 64


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that makes a file another user's: root can, and anybody else becomes another."""

    def change(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 4321, 4321, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 4321)

    return change


def plant(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "registry.yaml"
    path.write_text(json.dumps({"version": 1, "experts": [ENTRY]}))
    return path


def make_registry(what: str, give_away: Callable[[Path], None]) -> Path:
    """A registry above the current folder, which somebody else could have written."""
    above = Path.cwd() / "above"
    (above / "here").mkdir(parents=True)
    os.chdir(above / "here")
    path = plant(above if what != "link" else above.parent / "elsewhere")
    if what == "link":
        (above / "registry.yaml").symlink_to(path)
    if what in ("file", "link"):
        give_away(path)
    elif what == "folder":
        give_away(above)
    elif what == "writable file":
        path.chmod(0o666)
    elif what == "writable folder":
        above.chmod(0o1777)
    return above / "registry.yaml"


KINDS = ["file", "folder", "link", "writable file", "writable folder"]


@pytest.mark.parametrize("what", KINDS)
def test_the_registry_of_another_user_is_not_read(
    what: str, give_away: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_registry(what, give_away)
    ran = run_hub("list", "--quiet")
    assert ran.code == 0 and "planted" not in ran.out
    (note,) = ran.lines("note: ")
    assert f"{path} is not read" in note and f"--registry {path}" in note
    with pytest.warns(UnsafeFileWarning, match="HUB_SAFE_FOLDERS"):
        Registry.read()
    named = run_hub("list", "--quiet", "--registry", path)
    assert named.out.startswith("planted@1") or "planted@1" in named.out
    assert not named.lines("note: ")
    monkeypatch.setenv("HUB_SAFE_FOLDERS", f"/nowhere:{path.parent}:{path.resolve().parent}")
    allowed = run_hub("list", "--quiet")
    assert "planted@1" in allowed.out and not allowed.lines("note: ")


def test_an_own_registry_is_read() -> None:
    plant(Path.cwd())
    ran = run_hub("list", "--quiet")
    assert "planted@1" in ran.out and not ran.err


def test_files_of_root_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    path = plant(Path.cwd())
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert (find_danger(path) is None) == (own == 0)


@pytest.mark.parametrize("what", ["card.yaml", "."])
def test_a_task_of_another_user_is_not_read(what: str, give_away: Callable[[Path], None]) -> None:
    """A plain name can be a folder in the current one; `./name` names it explicitly."""
    example = Example(id=example_id("1", ["a", "b"]), input="1", choices=["a", "b"], answer=0)
    write_task("local", Card(name="snarks", source="made-up"), [example])
    (tasks_folder() / "local" / "snarks").rename("snarks")
    assert len(read_task("snarks").examples) == 1
    give_away(Path("snarks") / what)
    with pytest.raises(UsageError, match="belongs to another user") as caught:
        read_task("snarks")
    assert "./snarks" in caught.value.hint
    assert len(read_task("./snarks").examples) == 1
