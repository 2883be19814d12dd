"""Packages that are absent or broken block nothing that does not use them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_hub
from experthub.hub.errors import HubError
from experthub.hub.kinds import kinds
from experthub.hub.registry.expert import Expert
from experthub.hub.registry.registry import Registry
from experthub.hub.registry.registry_file import read_file

pytestmark = pytest.mark.attack
ENTRY = """version: 1
experts:
  - {name: theirs, kind: alien, base: b, sources: ['./theirs'], digest: 'sha256:DIGEST'}
""".replace("DIGEST", "0" * 64)


@pytest.fixture
def recipe(expert_folder: Callable[..., Path], base_folder: Path) -> Path:
    """A recipe of a folder, beside a registry with an entry of a kind that no package has."""
    Path("registry.yaml").write_text(ENTRY)
    path = Path("r.yaml")
    path.write_text(
        f"base: {base_folder}\nexperts: [{expert_folder()}]\nmerge: {{method: linear}}\n"
    )
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["compose", "r.yaml"],
        ["list"],
        ["search", "theirs"],
        ["show", "theirs"],
        ["verify"],
        ["gc", "--yes"],
        ["du"],
        ["lock", "r.yaml"],
    ],
)
def test_an_entry_of_an_unknown_kind_blocks_nothing(words: list[str], recipe: Path) -> None:
    ran = run_hub(*words)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    "words", [["pull", "theirs"], ["train", "gate", "theirs"], ["push", "theirs", "hf:a/b"]]
)
def test_its_use_is_an_error(words: list[str], recipe: Path) -> None:
    ran = run_hub(*words)
    assert ran.code != 0 and len(ran.lines("error: ")) == 1 and "Traceback" not in ran.err


def test_it_is_written_again_with_other_entries(recipe: Path) -> None:
    from experthub.hub.registry.entries import register

    mine = Expert(name="mine", base="b", sources=["./mine"], digest="sha256:" + "1" * 64)
    register(mine, Path("registry.yaml"))
    assert [e.kind for e in read_file(Path("registry.yaml")).experts] == ["lora", "alien"]


@pytest.mark.parametrize("kind", ["LORA", "x" * 99, "a b", "\x1b[2J", "", "../x"])
def test_kinds_are_words(kind: str, recipe: Path) -> None:
    Path("registry.yaml").write_text(ENTRY.replace("kind: alien", f"kind: {kind!a}"))
    with pytest.raises(HubError, match="kind"):
        Registry.read()


def test_an_unknown_kind_is_named(recipe: Path) -> None:
    assert "alien" not in kinds
    with pytest.raises(HubError, match="unknown kind 'alien'; known kinds: lora, ") as caught:
        kinds["alien"]
    assert caught.value.hint == "install the package that adds this kind"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("group", ["merges", "routers", "kinds"])
def test_a_package_that_fails_to_import_is_one_warning(
    group: str, recipe: Path, tmp_path: Path
) -> None:
    """In a process of its own: the warning is one line on standard error, and nothing else fails."""
    site = tmp_path / "site"
    (site / "fancy-1.0.dist-info").mkdir(parents=True)
    (site / "fancy.py").write_text("raise RuntimeError('\\x1b[2J\\nerror: owned')\n")
    (site / "fancy-1.0.dist-info" / "METADATA").write_text("Name: fancy\nVersion: 1.0\n")
    (site / "fancy-1.0.dist-info" / "entry_points.txt").write_text(
        f"[experthub.{group}]\nfancy = fancy\n"
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("hub"), "compose", "r.yaml"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    assert all(line.isprintable() and not line.startswith("error") for line in lines)
    assert len(warned) == (group == "merges") or (group == "kinds" and len(warned) == 1)
    assert all("the package fancy cannot be loaded" in line for line in warned)
