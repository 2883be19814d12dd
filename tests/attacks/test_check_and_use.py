"""Changes between the check of a file and its use: nothing unchecked gets into the store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran, run_hub
from experthub.hub.files.digests import sha256_of
from experthub.hub.formats import safetensors_header
from experthub.hub.store import folder as door
from experthub.hub.store.store import Store
from kinds_of_folders import MAKERS, break_numbers
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.attack, pytest.mark.usefixtures("hurried")]
KINDS = sorted(MAKERS)
WAYS: dict[str, Callable[[Path], tuple[str | Path, ...]]] = {
    "add": lambda folder: ("add", folder, "--name", "mine"),
    "pull": lambda folder: ("pull", f"file:{folder}", "--name", "mine"),
    "recipe": lambda folder: ("compose", folder.parent / "recipe.yaml"),
}


def linked(folder: Path) -> dict[Path, Path]:
    """Put the files of a folder behind symbolic links; link -> file."""
    found = {}
    for path in sorted(folder.iterdir()):
        file = folder.parent / f"good-{path.name}"
        path.rename(file)
        path.symlink_to(file)
        found[path] = file
    return found


def swap(links: dict[Path, Path]) -> None:
    """Let the links of all safetensors lead to files with NaN."""
    for link, file in links.items():
        if link.suffix == ".safetensors":
            bad = file.with_name(f"bad-{link.name}")
            bad.write_bytes(break_numbers(file))
            new = link.with_name("new")
            new.symlink_to(bad)
            new.replace(link)


def at_check(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Run an attack once, after the first file was found to be finite."""
    check, done = door.check_finite, []

    def hooked(path: Path, tensors: safetensors_header.Header) -> None:
        check(path, tensors)
        if not done:
            done.append(path)
            act()

    monkeypatch.setattr(door, "check_finite", hooked)


def nothing_bad(home: Path, ran: Ran) -> None:
    """Every stored object is finite, and has the sha256 of its name."""
    assert ran.code in (0, 3), ran.err
    assert "Traceback" not in ran.err
    for sha256, path in Store().list_objects().items():
        assert sha256_of(path) == sha256
        assert not path.read_bytes().endswith(b"\xff\xff\xff\x7f"), "NaN in the store"
    assert not [p for p in home.glob("drafts/*") if p.is_dir()], "a draft was left"


@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_link(
    kind: str, tmp_path: Path, base_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it"
    MAKERS[kind](folder, base_folder)
    links = linked(folder)
    at_check(monkeypatch, lambda: swap(links))
    ran = run_hub("add", folder, "--name", "mine", "--base", "tiny")
    nothing_bad(home, ran)
    assert ran.code == 0, ran.err
    good = {sha256_of(file) for file in links.values()}
    assert good <= set(Store().list_objects()), "what was checked is what is stored"


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_swapped_link_on_every_way_in(
    way: str,
    tmp_path: Path,
    base_folder: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    expert_folder: Callable[..., Path],
) -> None:
    folder = expert_folder(1, gates=False)
    recipe = f"base: {base_folder}\nexperts: [{folder}]\nmerge: {{method: linear}}\n"
    (folder.parent / "recipe.yaml").write_text(recipe)
    links = linked(folder)
    at_check(monkeypatch, lambda: swap(links))
    ran = run_hub(*WAYS[way](folder))
    nothing_bad(home, ran)
    assert ran.code == 0, ran.err
    # The second attempt finds the object in the store, and still reads the source only once.
    for link, file in links.items():
        link.unlink()
        link.symlink_to(file)
    at_check(monkeypatch, lambda: swap(links))
    nothing_bad(home, run_hub(*WAYS[way](folder)))


@pytest.mark.parametrize("kind", ["lora", "shards"])
def test_a_truncated_map(kind: str, tmp_path: Path, base_folder: Path, home: Path) -> None:
    """A file that is cut while it is mapped would kill the process with SIGBUS."""
    folder = tmp_path / "it"
    MAKERS[kind](folder, base_folder)
    script = (
        "import os, sys, numpy\n"
        "from pathlib import Path\n"
        "folder, before = Path(sys.argv[1]), numpy.memmap\n"
        "def mapped(path, *args, **more):\n"
        "    made = before(path, *args, **more)\n"
        "    for file in folder.glob('*.safetensors'):\n"
        "        os.truncate(file, 0)\n"
        "    return made\n"
        "numpy.memmap = mapped\n"
        "from experthub.cli.main import app\n"
        "app(['add', sys.argv[1], '--name', 'mine', '--base', 'tiny'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3), (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.sampled(2)
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_model_that_is_cut_during_a_difference(
    which: str, tmp_path: Path, base_folder: Path, home: Path
) -> None:
    """The models of a difference stay where they are, and so they are read, not mapped."""
    base, tuned = (shutil.copytree(base_folder, tmp_path / name) for name in ("base", "tuned"))
    weights = load_file(tuned / "model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, tuned / "model.safetensors")
    script = (
        "import os, sys\n"
        "from experthub.hub.finetunes import difference\n"
        "before = difference.find_changed\n"
        "def cut(*given):\n"
        "    os.truncate(sys.argv[3], 8)\n"
        "    return before(*given)\n"
        "difference.find_changed = cut\n"
        "from experthub.cli.main import app\n"
        "app(['diff', *sys.argv[1:3], '--name', 'mine'])\n"
    )
    cut = (base if which == "base" else tuned) / "model.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", script, base, tuned, cut],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3 and "was cut" in done.stderr, (done.returncode, done.stderr)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_during_the_check(
    kind: str, tmp_path: Path, base_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "it"
    MAKERS[kind](folder, base_folder)
    read, done = door.read_header, []

    def hooked(path: Path) -> safetensors_header.Header:
        header = read(path)
        if not done:
            done.append(path)
            for file in folder.glob("*.safetensors"):
                os.truncate(file, 40)
        return header

    monkeypatch.setattr(door, "read_header", hooked)
    nothing_bad(home, run_hub("add", folder, "--name", "mine", "--base", "tiny"))
