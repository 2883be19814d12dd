"""Content that calls itself by a known name, or by a version that no other one could follow."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_expert, run_hub
from experthub.hub.errors import HubError
from experthub.hub.formats import oci_layout
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.store.folder import read_folder
from experthub.hub.transfer.describe import write_description

pytestmark = pytest.mark.attack
Make = Callable[..., Path]


def describe(folder: Path, name: str, version: int) -> Path:
    """Write an expert.json that claims a name and a version."""
    identity = read_folder(folder)
    sources = [f"file:{folder}"]
    claimed = Expert(name=name, base="b", sources=sources, digest=identity.digest, version=version)
    write_description(folder, claimed, identity)
    return folder


def found(reference: str) -> str:
    return Registry.read().find_expert(Reference.parse(reference)).digest


@pytest.fixture
def mine(expert_folder: Make) -> str:
    """The digest of the expert that the user knows as `mine`."""
    assert run_hub("add", expert_folder(1), "--name", "mine", "--base", "b").code == 0
    return found("mine")


def stranger(form: str, make: Make, tmp_path: Path, seed: int = 2, version: int = 2) -> str:
    """Another expert that calls itself `mine`, in a folder, a shared folder or an archive."""
    folder = describe(make(seed), "mine", version)
    if form == "folder":
        return str(folder)
    if form == "folder of this name":
        (folder / "expert.json").unlink()
        return str(folder.rename(folder.parent / "mine"))
    import os

    here = os.environ["HUB_HOME"]
    os.environ["HUB_HOME"] = str(tmp_path / f"stranger-{seed}-{version}")
    try:
        assert run_hub("pull", f"file:{folder}").code == 0
        place = tmp_path / ("shared" if form == "shared" else f"a{seed}{version}.tar")
        reference = f"mine@{version}"
        if form == "shared":
            assert run_hub("push", reference, f"file:{place}").code == 0
        else:
            assert run_hub("export", reference, place).code == 0
    finally:
        os.environ["HUB_HOME"] = here
    return f"file:{place}"


FORMS = ["folder", "folder of this name", "shared", "archive"]


@pytest.mark.parametrize("form", FORMS)
def test_a_known_name_from_elsewhere_needs_a_yes(
    form: str, mine: str, expert_folder: Make, tmp_path: Path
) -> None:
    source = stranger(form, expert_folder, tmp_path)
    ran = run_hub("pull", source)
    assert ran.code == 6 and "came from another place" in ran.err and "--yes" in ran.err
    assert found("mine") == mine
    assert run_hub("pull", source, "--name", "other").code == 0
    assert found("mine") == mine != found("other")
    assert run_hub("pull", source, "--yes").code == 0
    assert found("mine") == found("other")


def test_an_imported_archive_needs_a_yes(mine: str, expert_folder: Make, tmp_path: Path) -> None:
    archive = stranger("archive", expert_folder, tmp_path).removeprefix("file:")
    assert run_hub("import", archive).code == 6 and found("mine") == mine
    assert run_hub("import", archive, "--yes").code == 0 and found("mine") != mine


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 6), ("", 6)])
def test_a_terminal_is_asked(
    answer: str,
    code: int,
    mine: str,
    expert_folder: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = stranger("folder", expert_folder, tmp_path)
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    ran = run_hub("pull", source)
    assert ran.code == code and "[y/N]" in ran.err
    assert (found("mine") == mine) == (code != 0)


def test_the_same_place_may_have_a_newer_version(expert_folder: Make, tmp_path: Path) -> None:
    source = stranger("shared", expert_folder, tmp_path, version=1)
    assert run_hub("pull", source).code == 0
    first = found("mine")
    stranger("shared", expert_folder, tmp_path, seed=3, version=2)
    assert run_hub("pull", source).code == 0
    assert found("mine") == found("mine@2") != first == found("mine@1")
    assert run_hub("pull", source).code == 0  # Nothing is new.


def test_a_copy_does_not_make_a_place_trusted(
    mine: str, expert_folder: Make, tmp_path: Path
) -> None:
    """A stranger who first shares a copy of the known expert is still a stranger."""
    source = stranger("shared", expert_folder, tmp_path, seed=1, version=1)
    assert run_hub("pull", source).code == 0 and found("mine") == mine
    stranger("shared", expert_folder, tmp_path, seed=2, version=2)
    assert run_hub("pull", source).code == 6 and found("mine") == mine


def test_a_name_of_another_layer_is_known(expert_folder: Make, tmp_path: Path) -> None:
    """The names of the starter registry count, too."""
    name = Registry.read().list_experts()[0].name
    before = found(name)
    source = describe(expert_folder(2), name, 7)
    assert run_hub("pull", source).code == 6 and found(name) == before


def test_an_entry_of_a_project_takes_over_no_name(mine: str, expert_folder: Make) -> None:
    """`hub pull NAME` copies an entry of registry.yaml to the user's own registry."""
    folder = describe(expert_folder(2), "mine", 5)
    entry = {"name": "mine", "version": 5, "base": "b", "sources": [f"file:{folder}"]}
    entry["digest"] = read_folder(folder).digest
    Path("registry.yaml").write_text(json.dumps({"version": 1, "experts": [entry]}))
    assert run_hub("pull", "mine").code == 6
    Path("registry.yaml").rename("away.yaml")
    assert found("mine") == mine
    assert run_hub("pull", "mine", "--registry", "away.yaml", "--yes").code == 0
    assert found("mine") == entry["digest"]


@pytest.mark.parametrize("version", [1_000_000, 999_999_999])
def test_versions_have_a_limit(version: int, expert_folder: Make) -> None:
    folder = describe(expert_folder(1), "new", version)
    assert run_hub("pull", folder).code == 3
    assert run_hub("add", folder, "--name", "new").code == 3
    assert run_hub("add", folder, "--name", "new", "--version", version).code == 2
    with pytest.raises(HubError):
        found("new")
    assert run_hub("pull", folder, "--name", "other").code == 0 and found("other@1")


def test_no_version_follows_the_last_one(base_folder: Path, tmp_path: Path) -> None:
    first, second = (make_expert(tmp_path / f"e{n}", base_folder, n) for n in (1, 2))
    add = ("--name", "mine", "--base", "b")
    assert run_hub("add", first, *add, "--version", "999999").code == 0
    ran = run_hub("add", second, *add)
    assert ran.code == 2 and "hub rm" in ran.err


def test_a_blob_of_a_wrong_size_is_not_read(
    expert_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a blob in a shared folder is compared before its bytes are hashed."""
    source = stranger("shared", expert_folder, tmp_path)
    blobs = (Path(source.removeprefix("file:")) / "blobs" / "sha256").iterdir()
    largest = max(blobs, key=lambda path: path.stat().st_size)
    with largest.open("ab") as file:
        file.truncate(1 << 34)
    read: list[int] = []
    real = oci_layout.read_chunks
    monkeypatch.setattr(
        oci_layout,
        "read_chunks",
        lambda file, start, size: (read.append(size), real(file, start, size))[1],
    )
    ran = run_hub("pull", source)
    assert ran.code == 3 and "is damaged" in ran.err and max(read) < 1 << 20
