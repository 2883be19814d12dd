"""The store: objects under their content's digest, whole or not there, and never written again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import at_once, run_hub, snapshot
from experthub import hub
from experthub.hub.errors import HubError, IntegrityError, NotFoundError
from experthub.hub.files import atomic
from experthub.hub.files.path_checks import ensure_space
from experthub.hub.registry.expert import Expert
from experthub.hub.store import store
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store
from experthub.hub.transfer.describe import write_description
from safetensors.torch import load_file, save_file

Make = Callable[..., Path]
ADAPTER = "adapter_model.safetensors"
FILES = ("adapter_config.json", ADAPTER, "phatgoose_gates.safetensors")


def digest_by_hand(folder: Path, fingerprint: str | None = None) -> str:
    """The contract's formula, without the project's code."""
    files = {
        name: {
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "size": (folder / name).stat().st_size,
        }
        for name in FILES
        if (folder / name).exists()
    }
    identity = {"schema": 1, "kind": "lora", "base_fingerprint": fingerprint, "files": files}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def object_path(home: Path, sha256: str) -> Path:
    return home / "objects" / "sha256" / sha256[:2] / sha256[2:]


def objects(home: Path) -> dict[str, Path]:
    """Every object by the digest that its path states."""
    root = home / "objects" / "sha256"
    return {p.parent.name + p.name: p for p in root.rglob("*") if p.is_file()}


def describe(folder: Path, **fields: Any) -> None:
    identity = read_folder(folder)
    entry = {"name": "x", "base": "b", "sources": ["file:x"], "digest": identity.digest}
    write_description(folder, Expert(**(entry | fields)), identity)


@pytest.mark.parametrize("gates", [True, False])
def test_digest_is_the_contracts_formula(gates: bool, expert_folder: Make) -> None:
    folder = expert_folder(1, gates=gates)
    digest, identity = Store().add(folder)
    assert digest == digest_by_hand(folder) == identity.digest
    assert set(identity.files) == set(FILES if gates else FILES[:2])


def test_digest_with_a_fingerprint(expert_folder: Make) -> None:
    folder = expert_folder(1)
    fingerprint = "sha256:" + "5" * 64
    identity = read_folder(folder).model_copy(update={"base_fingerprint": fingerprint})
    expert = Expert(name="x", base="b", sources=["file:x"], digest=identity.digest)
    write_description(folder, expert, identity)
    digest, _ = Store().add(folder)
    assert digest == digest_by_hand(folder, fingerprint)
    assert digest != digest_by_hand(folder)


def test_digest_does_not_depend_on_names_and_descriptions(expert_folder: Make) -> None:
    folder = expert_folder(1)
    digest = Store().add(folder)[0]
    (folder / "README.md").write_text("# mine")
    describe(folder, name="one", description="a", license="mit", tags=["t"])
    assert Store().add(folder)[0] == digest
    describe(folder, name="other", version=7, description="b", task="local:x")
    assert Store().add(folder)[0] == digest
    moved = folder.rename(folder.parent / "elsewhere")
    assert Store().add(moved)[0] == digest


def test_digest_depends_on_every_file(expert_folder: Make) -> None:
    digests = {Store().add(expert_folder(1))[0]}
    for name in FILES:
        folder = expert_folder(1)
        if name.endswith(".json"):
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(config | {"lora_dropout": 0.1}))
        else:
            tensors = load_file(folder / name)
            next(iter(tensors.values())).view(-1)[0] += 1
            save_file(tensors, folder / name)
        digests.add(Store().add(folder)[0])
    assert len(digests) == 4


def test_objects_are_read_only_and_named_by_content(home: Path, expert_folder: Make) -> None:
    folder = expert_folder(1)
    digest, identity = Store().add(folder)
    found = objects(home)
    assert set(found) == {digest[7:], *(info.sha256 for info in identity.files.values())}
    for name, path in found.items():
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
        assert path.stat().st_nlink == 1, "a hard link could be written through"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == name
    assert not list(home.rglob(".*"))


def test_experts_share_equal_files(home: Path, expert_folder: Make) -> None:
    folder = expert_folder(1)
    Store().add(folder)
    (folder / "phatgoose_gates.safetensors").unlink()
    count = len(objects(home))
    Store().add(folder)
    assert len(objects(home)) == count + 1, "only the identity is new"


def test_the_source_may_go_once_it_is_stored(base_folder: Path, expert_folder: Make) -> None:
    folder = expert_folder(1)
    assert run_hub("add", folder, "--name", "x").code == 0
    shutil.rmtree(folder)
    hub.compose({"base": str(base_folder), "experts": ["x"], "merge": {"method": "linear"}})


@pytest.mark.parametrize("name", FILES)
def test_damaged_object_is_noticed_when_it_is_used(
    name: str, home: Path, base_folder: Path, expert_folder: Make
) -> None:
    """One flipped bit, the size unchanged: in every file of the expert."""
    folder = expert_folder(1)
    assert run_hub("add", folder, "--name", "x").code == 0
    digest, identity = Store().add(folder)
    path = object_path(home, identity.files[name].sha256)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    recipe = {"base": str(base_folder), "experts": ["x"], "route": {"method": "phatgoose"}}
    with pytest.raises(IntegrityError, match="in the store is damaged") as caught:
        hub.compose(recipe)
    assert "hub verify --repair" in caught.value.hint
    with pytest.raises(IntegrityError, match=f"object {identity.files[name].sha256[:12]} "):
        Store().verify_file(digest, name)
    assert run_hub("verify", "--repair").code == 0, "the hint's way out"
    hub.compose(recipe)


def test_damaged_identity_is_noticed(home: Path, expert_folder: Make) -> None:
    digest, _ = Store().add(expert_folder(1))
    path = object_path(home, digest[7:])
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"lora"', '"task_vector"'))
    with pytest.raises(IntegrityError, match="damaged"):
        Store().read_identity(digest)


def test_an_object_that_is_no_identity(expert_folder: Make) -> None:
    """A registry may state any digest, also that of a configuration."""
    _, identity = Store().add(expert_folder(1))
    with pytest.raises(HubError) as caught:
        Store().read_identity("sha256:" + identity.files["adapter_config.json"].sha256)
    assert caught.value.code == 3


def test_lost_object_is_pulled_again(home: Path, expert_folder: Make) -> None:
    folder = expert_folder(1)
    assert run_hub("add", folder, "--name", "x").code == 0
    digest, identity = Store().add(folder)
    path = object_path(home, identity.files[ADAPTER].sha256)
    path.unlink()
    with pytest.raises(NotFoundError, match=f"{ADAPTER} .* missing"):
        Store().read_identity(digest)
    assert run_hub("pull", "x").code == 0
    assert path.is_file()


def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", [fail, interrupt])
@pytest.mark.parametrize(("where", "name"), [(os, "fsync"), (os, "link"), (os, "open")])
def test_interrupted_put_leaves_nothing(
    how: Callable[..., None],
    where: Any,
    name: str,
    home: Path,
    expert_folder: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = expert_folder(1)
    before = snapshot(home)
    with monkeypatch.context() as patch, pytest.raises((OSError, KeyboardInterrupt)):
        patch.setattr(where, name, how)
        Store().add(folder)
    assert snapshot(home) == before
    digest, _ = Store().add(folder)
    assert Store().read_identity(digest).digest == digest


def test_expert_interrupted_between_its_files_is_not_there(
    home: Path, expert_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files first, identity last: what is there is whole, and the expert is not."""
    folder = expert_folder(1)
    put, count = Store.put, 0

    def second_fails(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return put(*arguments, **options) if count == 1 else fail()

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Store, "put", second_fails)
        Store().add(folder)
    assert count == 2
    for name, path in objects(home).items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == name
    with pytest.raises(NotFoundError):
        Store().read_identity(digest_by_hand(folder))
    assert Store().add(folder)[0] == digest_by_hand(folder)


def test_file_that_changes_while_it_is_checked_does_not_matter(
    home: Path, expert_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = expert_folder(1)
    expected = read_folder(folder).digest

    def changed(place: Path, *hashed: Any) -> Any:
        identity = read_folder(place, *hashed)
        with (folder / ADAPTER).open("r+b") as file:
            file.write(b"\0")
        return identity

    monkeypatch.setattr(store, "read_folder", changed)
    assert Store().add(folder)[0] == expected
    for name, path in objects(home).items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == name


def test_put_needs_the_stated_content(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(IntegrityError):
        Store().put(tmp_path / "file", "0" * 64)
    assert not objects(home)
    path = Store().put(tmp_path / "file", digest)
    (tmp_path / "file").write_bytes(b"other")
    assert Store().put(tmp_path / "file", digest) == path
    assert path.read_bytes() == b"abc", "an object is never written again"
    assert digest in Store() and "0" * 64 not in Store()


def test_copies_out_can_be_written_without_harm(
    home: Path, tmp_path: Path, expert_folder: Make
) -> None:
    folder = expert_folder(1)
    digest, _ = Store().add(folder)
    before = snapshot(home / "objects")
    Store().copy_out(digest, tmp_path / "out")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(b"")
    assert snapshot(home / "objects") == before


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic.open_atomically(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(ValueError, match="stop"), atomic.open_atomically(path) as file:
        file.write(b"two")
        raise ValueError("stop")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.glob("[.f]*")] == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(ValueError, match="stop"), atomic.create_folder(target) as draft:
        (draft / "file").write_text("x")
        raise ValueError("stop")
    assert not target.exists()
    with atomic.create_folder(target) as draft:
        (draft / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert not list(tmp_path.glob(".*"))


def test_disk_without_room_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    ensure_space(tmp_path, 1)
    with pytest.raises(HubError, match="MiB free"):
        ensure_space(tmp_path, 1 << 60)


ADD = """
import sys
from pathlib import Path
from experthub.hub.store.store import Store
print("ready", flush=True)
sys.stdin.readline()
print(Store().add(Path(sys.argv[1]))[0])
"""


def test_processes_add_the_same_expert_at_once(home: Path, expert_folder: Make) -> None:
    folder = expert_folder(1)
    assert set(at_once(ADD, *[[folder]] * 3)) == {digest_by_hand(folder)}
    assert len(objects(home)) == 4
    assert not list(home.rglob(".*"))
