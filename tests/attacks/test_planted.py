"""Links, names and false digests that somebody else put into the hub's home or a shared folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import run_hub
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files.atomic import create_folder, write_text
from experthub.hub.files.file_locks import hold_lock
from experthub.hub.maintenance.collection import collect
from experthub.hub.store.store import Store
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.hub.transfer.remotes import _http
from experthub.hub.transfer.remotes._download import download
from hf_server import HfServer
from pydantic import ValidationError
from test_hostile import publish

pytestmark = [pytest.mark.attack, pytest.mark.usefixtures("hurried")]
Make = Callable[..., Path]
DRAFT_NAME = ".x.0123456789abcdef"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN_PATH", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_http, "WAIT", 0.001)
    with HfServer(tmp_path / "server") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user that nothing may touch."""
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def serve_expert(server: HfServer, expert_folder: Make) -> dict[str, bytes]:
    files = {p.name: p.read_bytes() for p in expert_folder(1, gates=False).iterdir()}
    publish(server, files, "alice/mine")
    return files


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_a_partial_file_that_leads_elsewhere(
    kind: str, server: HfServer, home: Path, victim: Path, expert_folder: Make
) -> None:
    files = serve_expert(server, expert_folder)
    sha256 = hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
    partial = home / "partial" / sha256
    partial.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(partial)
    else:
        partial.symlink_to(victim if kind == "link" else victim.with_name("new"))
    ran = run_hub("pull", "hf:alice/mine")
    assert ran.code == 3 and str(partial) in ran.err, ran.err
    assert victim.read_text() == "precious" and not victim.with_name("new").exists()
    partial.unlink()
    assert run_hub("pull", "hf:alice/mine").code == 0, "the hint works"


def pull_and_forget(home: Path) -> Path:
    """Pull the served expert, remove all of it, and return the folder that the next pull makes."""
    assert run_hub("pull", "hf:alice/mine").code == 0
    (target,) = (p for p in (home / "hf" / "alice--mine").iterdir() if "-" in p.name)
    for folder in (target, home / "objects", home / "registry"):
        shutil.rmtree(folder)
    return target


def test_the_draft_of_a_repository_that_leads_elsewhere(
    server: HfServer, home: Path, victim: Path, expert_folder: Make
) -> None:
    """Whatever a draft held besides the repository's files was deleted, also behind a link."""
    serve_expert(server, expert_folder)
    target = pull_and_forget(home)
    outside = victim.parent / "outside"
    outside.mkdir()
    (outside / "letter").write_text("precious")
    target.with_name(f".{target.name}").symlink_to(outside)
    ran = run_hub("pull", "hf:alice/mine")
    assert ran.code == 0, ran.err
    assert [p.name for p in outside.iterdir()] == ["letter"]


def test_a_file_in_the_draft_of_a_repository_that_leads_elsewhere(
    server: HfServer, home: Path, victim: Path, expert_folder: Make
) -> None:
    serve_expert(server, expert_folder)
    target = pull_and_forget(home)
    draft = target.with_name(f".{target.name}")
    draft.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "stray"):
        (draft / name).symlink_to(victim)
    (draft / "folder").mkdir()
    ran = run_hub("pull", "hf:alice/mine")
    assert ran.code == 0, ran.err
    assert victim.read_text() == "precious"
    assert not [p for p in target.iterdir() if p.is_symlink()]


@pytest.mark.parametrize("place", ["locks/registry", "locks/collecting"])
def test_a_lock_that_leads_elsewhere(
    place: str, home: Path, victim: Path, expert_folder: Make
) -> None:
    link = home / place
    link.parent.mkdir(parents=True)
    link.symlink_to(victim.with_name("made"))
    ran = run_hub("add", expert_folder(1), "--name", "mine")
    assert ran.code == 3 and str(link) in ran.err
    assert not victim.with_name("made").exists()


def test_a_lock_in_a_shared_folder(tmp_path: Path, victim: Path, expert_folder: Make) -> None:
    assert run_hub("add", expert_folder(1), "--name", "mine").code == 0
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / ".lock").symlink_to(victim.with_name("made"))
    assert run_hub("push", "mine", f"file:{shared}").code == 3
    assert not victim.with_name("made").exists()


def test_a_collection_stays_inside(home: Path, tmp_path: Path) -> None:
    """Old files behind a link in the hub's home belong to somebody else."""
    outside = tmp_path / "outside"
    outside.mkdir()
    old = outside / "letter"
    old.write_text("precious")
    draft = outside / DRAFT_NAME
    draft.write_text("precious")
    os.utime(old, (0, 0))
    for link in ("hf/a--b/.draft", "banks/x", "hf/c--d", "registry/name", "results/ab", "tasks/t"):
        (home / link).parent.mkdir(parents=True, exist_ok=True)
        (home / link).symlink_to(outside)
    found = collect(None, Store(), grace=0)
    assert old.exists() and draft.exists(), found.leftovers


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002])
def test_the_umask_decides_who_reads(
    umask: int, home: Path, tmp_path: Path, expert_folder: Make
) -> None:
    folder = expert_folder(1)
    known = {home, *home.rglob("*")}
    before = os.umask(umask)
    try:
        assert run_hub("add", folder, "--name", "mine").code == 0
        assert run_hub("export", "mine", "--portable", tmp_path / "out").code == 0
        assert run_hub("export", "mine", tmp_path / "all.tar").code == 0
        assert run_hub("push", "mine", f"file:{tmp_path / 'shared'}").code == 0
        with create_folder(tmp_path / "made") as draft:
            write_text(draft / "file", "x")
    finally:
        os.umask(before)
    places = [home, tmp_path / "out", tmp_path / "all.tar", tmp_path / "shared", tmp_path / "made"]
    for place in places:
        for path in {place, *place.rglob("*")} - known:
            mode = stat.S_IMODE(path.stat().st_mode)
            usual = 0o777 if path.is_dir() else 0o444 if "objects" in path.parts else 0o666
            assert mode == usual & ~umask, (path, oct(mode))


def test_the_umask_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def make_task(name: str, suite: str = "local") -> str:
    choices = ["yes", "no"]
    rows = [Example(id=example_id(t, choices), input=t, choices=choices, answer=0) for t in "abcd"]
    return write_task(suite, Card(name=name, source="made-up"), rows)


@pytest.mark.parametrize(("suite", "name"), [("local", DRAFT_NAME), (DRAFT_NAME, "x")])
def test_a_task_with_the_name_of_a_draft(suite: str, name: str, home: Path) -> None:
    """Such a task would be deleted as garbage, so it is not accepted."""
    with pytest.raises((HubError, ValidationError), match="is not a"):
        make_task(name, suite)
    assert not list(home.glob("tasks/*/*"))


def test_a_finished_task_is_not_garbage(home: Path) -> None:
    """A task that an earlier version accepted under the name of a draft stays."""
    make_task("x")
    place = home / "tasks/local" / DRAFT_NAME
    (home / "tasks/local/x").rename(place)
    card = (place / "card.yaml").read_text()
    (place / "card.yaml").write_text(card.replace("name: x", f"name: {DRAFT_NAME}"))
    collect(None, Store(), grace=0)
    assert (place / "examples.jsonl").is_file()


@pytest.mark.parametrize("how", ["pull", "pull all", "recipe", "archive"])
def test_a_false_digest_in_an_index(
    how: str, tmp_path: Path, home: Path, base_folder: Path, expert_folder: Make
) -> None:
    assert run_hub("add", expert_folder(1), "--name", "mine").code == 0
    shared = tmp_path / "shared"
    assert run_hub("push", "mine", f"file:{shared}").code == 0
    index = json.loads((shared / "index.json").read_text())
    false = "sha256:" + "1" * 64
    index["manifests"][0]["annotations"]["dev.experthub.expert.digest"] = false
    (shared / "index.json").write_text(json.dumps(index))
    place = shared
    if how == "archive":
        place = tmp_path / "all.tar"
        with tarfile.open(place, "w", format=tarfile.GNU_FORMAT) as archive:
            for path in sorted(p for p in shared.rglob("*") if p.is_file()):
                archive.add(path, str(path.relative_to(shared)))
    shutil.rmtree(home)
    source = f"file:{place}" + ("#mine@1" if how != "pull all" else "")
    recipe = f"base: {base_folder}\nexperts: ['{source}']\nmerge: {{method: linear}}\n"
    Path("recipe.yaml").write_text(recipe)
    ran = run_hub("compose", "recipe.yaml") if how == "recipe" else run_hub("pull", source)
    assert ran.code == 3, ran.err
    assert false[:19] in ran.err and str(place) in ran.err
    assert not list(home.glob("registry/*")) and not Store().list_objects()


def test_download_to_a_link(tmp_path: Path, victim: Path) -> None:
    sha256 = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / sha256).symlink_to(victim)
    with pytest.raises(IntegrityError, match="symbolic link"):
        download("http://127.0.0.1:9/x", sha256, tmp_path / "d")
    with pytest.raises(IntegrityError), hold_lock(tmp_path / "d" / sha256):
        pass
    assert victim.read_text() == "precious"
