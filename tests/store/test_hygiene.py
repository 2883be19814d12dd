"""Stored content is verified, repaired, counted, removed and collected."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_hub
from experthub import hub
from experthub.hub.errors import IntegrityError
from experthub.hub.files import yaml_files
from experthub.hub.maintenance.collection import collect
from experthub.hub.maintenance.verification import verify
from experthub.hub.session import Session
from experthub.hub.store.store import Store

Make = Callable[..., Path]
HOLDER = """
import sys
from experthub.hub.store.store import Store
Store().hold(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def flip(path: Path, at: int = -2) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


def added(folder: Path, name: str) -> str:
    ran = run_hub("add", folder, "--name", name, "--json")
    assert ran.code == 0, ran.err
    return str(ran.json["expert"]["digest"])


def age(store: Store, seconds: float = 7200) -> None:
    """Let every object be from a while ago."""
    for path in [*store.list_objects().values(), *(store.root / "trash").glob("*")]:
        os.utime(path, (time.time() - seconds,) * 2)


def gc(grace: float = 3600) -> tuple[int, int]:
    done = collect(None, Store(), grace=grace)
    return len(done.trashed), len(done.deleted)


@pytest.fixture(autouse=True)
def own_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds nothing: what the commands of a test add is not in use afterwards."""
    monkeypatch.setattr("experthub.hub.store.store.Store.hold", lambda *_, **__: None)


def test_every_flipped_bit_is_found_and_repaired(expert_folder: Make) -> None:
    digests = [added(expert_folder(i), name) for i, name in enumerate(("one", "two"))]
    store = Store()
    before = {sha256: path.read_bytes() for sha256, path in store.list_objects().items()}
    assert len(before) == 7  # the configuration is shared
    for sha256 in before:
        flip(store.path(sha256))
    ran = run_hub("verify", "--json")
    assert ran.code == 3 and set(ran.json["verify"]["damaged"]) == set(before)
    assert run_hub("verify").code == 3
    ran = run_hub("verify", "--repair", "--json")
    assert ran.code == 0, ran.err
    assert set(ran.json["verify"]["repaired"]) == set(before)
    assert {sha256: path.read_bytes() for sha256, path in store.list_objects().items()} == before
    assert run_hub("verify").code == 0
    assert {store.read_identity(d).digest for d in digests} == set(digests)


def test_what_cannot_be_repaired_stays_and_is_said(expert_folder: Make) -> None:
    folder = expert_folder(1)
    digest = added(folder, "one")
    store = Store()
    path = store.path(store.read_identity(digest).files["adapter_model.safetensors"].sha256)
    flip(path)
    kept = path.read_bytes()
    shutil.rmtree(folder)
    ran = run_hub("verify", "--repair")
    assert ran.code == 3
    assert "1 item is damaged" in ran.err and "one@1: cannot pull" in ran.err
    assert "damaged" in ran.out and "one@1" in ran.out
    assert path.read_bytes() == kept


def test_incomplete_absent_orphaned_and_strange(expert_folder: Make, home: Path) -> None:
    digest = added(expert_folder(1), "one")
    store = Store()
    store.add(expert_folder(2))
    (store.root / "objects" / "sha256" / "note.txt").write_text("x")
    path = store.path(store.read_identity(digest).files["adapter_model.safetensors"].sha256)
    path.unlink()
    found = verify(Session(store=store))
    assert found.whole and found.incomplete == ["one@1"] and not found.damaged
    assert len(found.orphans) == 3 and found.strangers == ["objects/sha256/note.txt"]
    assert found.absent, "the starter experts are not here"
    ran = run_hub("verify", "--repair")
    assert ran.code == 0 and "repaired  one@1" in ran.out and path.is_file()


def test_an_incomplete_expert_that_cannot_be_repaired_is_an_error(expert_folder: Make) -> None:
    folder = expert_folder(1)
    digest = added(folder, "one")
    store = Store()
    store.path(store.read_identity(digest).files["adapter_model.safetensors"].sha256).unlink()
    shutil.rmtree(folder)
    ran = run_hub("verify")
    assert ran.code == 0 and "incomplete  one@1" in ran.out
    ran = run_hub("verify", "--repair")
    assert ran.code == 3 and "incomplete  one@1" in ran.out
    assert "1 item is damaged or incomplete: one@1; one@1: cannot pull one@1" in ran.err
    assert "hint: fix these problems, and run hub verify --repair again" in ran.err
    assert run_hub("verify", "--repair", "--json").code == 3


def test_a_damaged_object_that_no_entry_uses_is_left_to_gc(expert_folder: Make) -> None:
    store = Store()
    _, identity = store.add(expert_folder(1))
    sha256 = identity.files["adapter_model.safetensors"].sha256
    flip(store.path(sha256))
    ran = run_hub("verify", "--repair")
    assert ran.code == 3 and f"{sha256[:12]}: no entry uses it; run hub gc to delete it" in ran.err
    age(store)
    assert run_hub("gc", "--grace", "0", "--yes").code == 0
    assert run_hub("verify").code == 0


def test_a_damaged_base_is_found(home: Path, base_folder: Path) -> None:
    entry = {"sources": ["pypi:tiny==1#tiny/model.safetensors"], "sha256": "ab" * 32}
    registry = {"version": 1, "bases": {"tiny": entry}}
    Path("registry.yaml").write_text(yaml_files.dump(registry))
    folder = home / "bases" / f"tiny-{'ab' * 6}"
    shutil.copytree(base_folder, folder)
    from experthub.hub.files.digests import sha256_of

    manifest = {p.name: sha256_of(p) for p in folder.iterdir()}
    (folder / "files.json").write_text(json.dumps(manifest))
    assert run_hub("verify").code == 0
    flip(folder / "config.json", 5)
    ran = run_hub("verify")
    assert ran.code == 3 and "base tiny: config.json" in ran.out


def test_gc_takes_two_steps(expert_folder: Make) -> None:
    digest = added(expert_folder(1), "one")
    store = Store()
    age(store)
    assert gc() == (0, 0)
    assert run_hub("rm", "one", "--yes").code == 0
    assert gc() == (4, 0) and not store.list_objects()
    assert gc() == (0, 0), "they wait in the trash"
    age(store)
    assert gc() == (0, 4)
    assert store.find_identity(digest) is None


def test_any_use_brings_back_from_the_trash(expert_folder: Make, base_folder: Path) -> None:
    folder = expert_folder(1)
    digest = added(folder, "one")
    store = Store()
    run_hub("rm", "one", "--yes")
    age(store)
    assert gc() == (4, 0)
    assert store.read_identity(digest).digest == digest
    assert len(store.list_objects()) == 4 and not list((store.root / "trash").iterdir())
    age(store)
    assert gc() == (4, 0)
    assert added(folder, "again") == digest
    assert len(store.list_objects()) == 4
    age(store)
    assert gc() == (0, 0)


def test_the_trash_gives_back_what_is_needed_again(expert_folder: Make) -> None:
    digest = added(expert_folder(1), "one")
    entry = next(Store().root.glob("registry/one/1.yaml"))
    text = entry.read_text()
    run_hub("rm", "one", "--yes")
    age(Store())
    assert gc() == (4, 0)
    entry.parent.mkdir()
    entry.write_text(text)
    done = collect(None, Store(), grace=0)
    assert len(done.restored) == 3 and not done.deleted, (
        "the identity came back when it was asked for"
    )
    assert Store().read_identity(digest).digest == digest


def test_young_objects_stay(expert_folder: Make) -> None:
    Store().add(expert_folder(1))
    assert gc() == (0, 0) and len(Store().list_objects()) == 4
    assert gc(0) == (4, 4) and not Store().list_objects()


def test_shared_files_stay(expert_folder: Make) -> None:
    added(expert_folder(1), "one")
    added(expert_folder(2), "two")
    run_hub("rm", "one", "--yes")
    assert gc(0) == (3, 3)
    assert verify(Session()).incomplete == []


def test_what_a_lock_pins_stays(expert_folder: Make, base_folder: Path) -> None:
    added(expert_folder(1), "one")
    recipe = {"base": str(base_folder), "experts": ["one"], "merge": {"method": "linear"}}
    Path("recipe.yaml").write_text(yaml_files.dump(recipe))
    assert run_hub("lock", "recipe.yaml").code == 0
    run_hub("rm", "one", "--yes")
    assert gc(0) == (0, 0)
    assert hub.plan_of("recipe.yaml", "frozen").members
    Path("recipe.lock.yaml").unlink()
    assert gc(0) == (4, 4)


def test_a_lock_that_cannot_be_read_stops_the_collection(
    expert_folder: Make, base_folder: Path
) -> None:
    added(expert_folder(1), "one")
    recipe = {"base": str(base_folder), "experts": ["one"], "merge": {"method": "linear"}}
    Path("recipe.yaml").write_text(yaml_files.dump(recipe))
    run_hub("lock", "recipe.yaml")
    run_hub("rm", "one", "--yes")
    Path("recipe.lock.yaml").write_text("version: [")
    with pytest.raises(IntegrityError, match="cannot tell what"):
        gc(0)
    assert len(Store().list_objects()) == 4


def test_a_damaged_identity_stops_the_collection(expert_folder: Make) -> None:
    digest = added(expert_folder(1), "one")
    Store().add(expert_folder(2))
    flip(Store().path(digest[7:]), 30)
    count = len(Store().list_objects())
    with pytest.raises(IntegrityError, match="damaged"):
        gc(0)
    assert len(Store().list_objects()) == count


def test_what_a_process_holds_stays_until_it_dies(expert_folder: Make) -> None:
    digest, _ = Store().add(expert_folder(1))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, digest], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    assert gc(0) == (0, 0)
    process.kill()
    process.wait()
    assert gc(0) == (4, 4)
    assert not list((Store().root / "leases").iterdir())


def test_a_dry_run_changes_nothing(expert_folder: Make) -> None:
    added(expert_folder(1), "one")
    run_hub("rm", "one", "--yes")
    ran = run_hub("gc", "--grace", "0", "--dry-run", "--json")
    assert len(ran.json["gc"]["trashed"]) == len(ran.json["gc"]["deleted"]) == 4
    assert len(Store().list_objects()) == 4
    assert "would be deleted: 4" in run_hub("gc", "--grace", "0", "--dry-run").out


def test_nobody_to_ask(expert_folder: Make) -> None:
    added(expert_folder(1), "one")
    ran = run_hub("rm", "one")
    assert ran.code == 2 and "--yes" in ran.err and "one@1" in run_hub("list", "-q").out
    run_hub("rm", "one", "--yes")
    assert run_hub("gc", "--grace", "0").code == 2 and len(Store().list_objects()) == 4
    assert run_hub("gc", "--grace", "0", "--yes").code == 0 and not Store().list_objects()


def test_rm(expert_folder: Make) -> None:
    added(expert_folder(1), "one")
    added(expert_folder(2), "one")
    ran = run_hub("rm", "one@1", "--yes", "--json")
    assert [e["name"] for e in ran.json["removed"]] == ["one@1"]
    assert run_hub("show", "one", "--json").json["expert"]["version"] == 2
    assert run_hub("rm", "one", "--yes").code == 0
    assert run_hub("rm", "one", "--yes").code == 4
    ran = run_hub("rm", "sentiment", "--yes")
    assert ran.code == 2 and "remove the entry from " in ran.err


def test_du(expert_folder: Make) -> None:
    added(expert_folder(1), "one")
    added(expert_folder(2), "two")
    found = run_hub("du", "--json").json
    sizes = {f["folder"]: f["bytes"] for f in found["folders"]}
    assert sizes["objects"] == sum(p.stat().st_size for p in Store().list_objects().values())
    assert found["bytes"] == sum(sizes.values())
    one = next(e for e in found["experts"] if e["expert"] == "one@1")
    assert 0 < one["own"] < one["bytes"], "the configuration is shared"
    assert "objects" in run_hub("du").out
    assert all(folder["purpose"] for folder in found["folders"])


def test_search(expert_folder: Make) -> None:
    added(expert_folder(1), "zebra-stripes")
    run_hub("add", expert_folder(2), "--name", "other", "--description", "Stripes of a zebra")
    assert run_hub("search", "zebra", "-q").out.split() == ["zebra-stripes@1", "other@1"]
    assert run_hub("search", "ZEBRA", "of a", "-q").out.split() == ["other@1"]
    names = [e["name"] for e in run_hub("search", "multiple choice", "--json").json["experts"]]
    assert "goal-inference" in names
    ran = run_hub("search", "zebra-stripe5")
    assert ran.code == 4 and "did you mean 'zebra-stripes'?" in ran.err
