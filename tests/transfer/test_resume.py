"""Faults while an expert is pulled: little is sent twice, and nothing damaged is stored.

Set HUB_KILLS for more rounds (2 by default here).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_hub
from experthub.hub.errors import HubError
from experthub.hub.maintenance.verification import verify
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store import store
from experthub.hub.store.store import Store
from experthub.hub.transfer.remotes import _http, hf
from hf_clients import filled
from hf_server import HfServer

Make = Callable[..., Path]
KILLS = int(os.environ.get("HUB_KILLS", "2"))
MIB = 1 << 20
WEIGHTS, GATES = "adapter_model.safetensors", "phatgoose_gates.safetensors"
SOURCE = "hf:alice/large"
RESOLVE = f"/resolve/.*{WEIGHTS}"
HUB = [sys.executable, "-W", "ignore", "-c", "from experthub.cli.main import app; app()"]
SLOWLY: dict[str, Any] = {"piece": MIB // 4, "pause": 0.02}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_http, "WAIT", 0.001)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    with HfServer(tmp_path / "server") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


@pytest.fixture
def files(server: HfServer, expert_folder: Make) -> dict[str, bytes]:
    """Return the files of the repository: weights of 11 MiB, gates and a configuration."""
    found = {p.name: p.read_bytes() for p in expert_folder(1, rank=3072).iterdir()}
    assert len(found[WEIGHTS]) > 8 * MIB
    filled(server, files=found, name="alice/large")
    return found


def pulled(home: Path, files: dict[str, bytes]) -> bool:
    """Pull; whether every byte is there, and nothing else is left."""
    ran = run_hub("pull", SOURCE, "--json")
    assert ran.code == 0, ran.err
    (entry,) = ran.json["pulled"]
    assert not [*(home / "partial").iterdir()] and not [*home.glob("hf/*/.*")]
    found = verify(Session())
    assert found.whole and not found.incomplete and not found.strangers
    return all(
        Store().verify_file(entry["digest"], name).read_bytes() == files[name] for name in files
    )


def sent(server: HfServer, name: str) -> int:
    return sum(request.sent for request in server.seen(f"/resolve/.*{name}", "GET"))


def arrived(home: Path) -> int:
    """Bytes of the weights that a running pull has so far."""
    sizes = [0]
    for path in home.glob("partial/*"):
        with contextlib.suppress(FileNotFoundError):  # a small file came to its end meanwhile
            sizes.append(path.stat().st_size)
    return max(sizes)


def test_a_kill(server: HfServer, files: dict[str, bytes], home: Path) -> None:
    """SIGKILL in the middle of a file: of each, no more than 1 MiB is sent again."""
    random.seed(os.environ.get("HUB_SEED", "0"))
    size = len(files[WEIGHTS])
    for _ in range(KILLS):
        shutil.rmtree(home, ignore_errors=True)
        server.requests.clear()
        target = random.randrange(MIB, size - 2 * MIB)
        fault = server.fault(RESOLVE, **SLOWLY)
        child = subprocess.Popen([*HUB, "pull", SOURCE], stderr=subprocess.DEVNULL)
        while arrived(home) < target:
            assert child.poll() is None
            time.sleep(0.001)
        child.kill()
        child.wait()
        server.faults.all.remove(fault)
        assert pulled(home, files)
        (first, second) = server.seen(RESOLVE, "GET")
        start = int(second.headers["range"].removeprefix("bytes=").removesuffix("-"))
        assert target <= start < size and second.status == 206 and second.sent == size - start
        assert first.sent + second.sent - size <= MIB
        for name in (GATES, "adapter_config.json"):
            assert sent(server, name) <= len(files[name]) + MIB
        print(f"killed at {target}: {first.sent + second.sent - size} bytes were sent twice")


def test_files_that_are_whole_are_not_sent_again(
    server: HfServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {f"model-{n}.safetensors": random.Random(n).randbytes(MIB) for n in range(3)}
    filled(server, files=contents, name="alice/shards")
    monkeypatch.setattr(_http, "TRIES", 1)
    server.fault("model-1", cut=100_000, times=1)
    server.fault("model-1", status=500, times=1)
    with pytest.raises(HubError, match="answered 500"):
        hf.fetch("hf:alice/shards", home / "hf")
    server.requests.clear()
    folder, _ = hf.fetch("hf:alice/shards", home / "hf")
    assert {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} == contents
    (again,) = server.seen("/resolve/", "GET")
    assert again.path.endswith("model-1.safetensors") and again.sent == MIB - 100_000
    assert not [*home.glob("hf/*/.*")] and not [*(home / "partial").iterdir()]


def test_what_is_damaged_in_a_draft_is_fetched_again(
    server: HfServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {f"model-{n}.safetensors": random.Random(n).randbytes(1000) for n in range(2)}
    filled(server, files=contents, name="alice/shards")
    server.fault("model-1", status=404, times=1)
    with pytest.raises(HubError):
        hf.fetch("hf:alice/shards", home / "hf")
    (draft,) = home.glob("hf/*/.*")
    (draft / "model-0.safetensors").write_bytes(b"other")
    (draft / "stray").write_bytes(b"of somebody")
    folder, _ = hf.fetch("hf:alice/shards", home / "hf")
    assert {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} == contents


def test_the_server_restarts(server: HfServer, files: dict[str, bytes], home: Path) -> None:
    """A pull that runs waits until it is there again, and goes on."""
    fault = server.fault(RESOLVE, times=1, **SLOWLY)
    child = subprocess.Popen([*HUB, "pull", SOURCE], stderr=subprocess.PIPE, text=True)
    while arrived(home) < 2 * MIB:
        assert child.poll() is None
        time.sleep(0.001)
    server.stop()
    server.start()
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert fault.hits == 1
    first, *others = server.seen(RESOLVE, "GET")
    assert others and all(int(r.headers["range"][6:-1]) >= 2 * MIB for r in others)
    assert first.sent + sum(r.sent for r in others) - len(files[WEIGHTS]) <= MIB
    assert pulled(home, files)


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


# What becomes of one answer, and how the pull ends.
FAULTS: dict[str, tuple[dict[str, Any], int]] = {
    "slow": (SLOWLY, 0),
    "cut": ({"cut": 3_000_000}, 0),
    "length too large": ({"length": 20 * MIB}, 3),
    "lost": ({"lose": True}, 0),
    "busy": ({"status": 429}, 0),
    "down": ({"status": 503}, 0),
    "short": ({"change": lambda body: body[:-5]}, 3),
    "long": ({"change": lambda body: body + b"12345"}, 3),
    "wrong": ({"change": flip}, 3),
    "refused": ({"status": 403}, 5),
    "absent": ({"status": 404}, 4),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(
    fault: str, name: str, server: HfServer, files: dict[str, bytes], home: Path
) -> None:
    how, code = FAULTS[fault]
    if fault == "length too large" and name != WEIGHTS:
        how = {"length": 1000}
    made = server.fault(f"/resolve/.*{name}", times=1, **how)
    ran = run_hub("pull", SOURCE)
    assert ran.code == code, ran.err
    assert len(ran.lines("error: ")) == (code != 0) and "Traceback" not in ran.err
    if code:
        assert not Store().list_objects() and not Registry.read().user.content.experts
        assert name in ran.err and not [*(home / "partial").iterdir()]
    assert pulled(home, files)
    assert made.hits == 1


@pytest.mark.parametrize("path", ["/revision/", "/tree/", RESOLVE, "/resolve/.*json"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_says_when_to_come_again(
    path: str, status: int, server: HfServer, files: Any, home: Path, monkeypatch: Any
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", waits.append)
    server.fault(path, status=status, headers={"Retry-After": "7"}, times=2)
    assert pulled(home, files)
    assert waits[:2] == [7.0, 7.0] and len(server.seen(path, "GET")) == 3


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_token_does_not_follow_elsewhere(
    host: str, server: HfServer, files: dict[str, bytes], home: Path
) -> None:
    """Nor to another port of the same host; the range does."""
    server.store.repository("alice/large").save(private=True)
    with HfServer(server.store.root) as other:
        address = other.url.replace("127.0.0.1", host)
        server.fault("/resolve/", redirect=address)
        (home / "partial").mkdir(parents=True)
        sha256 = rows(server)[WEIGHTS]["lfs"]
        (home / "partial" / sha256).write_bytes(files[WEIGHTS][:MIB])
        assert pulled(home, files)
        assert len(other.requests) == len(files)
        assert not [r for r in other.requests if "authorization" in r.headers]
        assert [r.headers.get("range") for r in other.seen(sha256)] == [f"bytes={MIB}-"]
    assert all(r.headers["authorization"] == "Bearer hf_write" for r in server.requests)


def rows(server: HfServer) -> dict[str, dict[str, Any]]:
    """The files of the newest commit."""
    repository = server.store.repository("alice/large")
    return dict(repository.commit(repository.revision("main"))["files"])


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(flip(path.read_bytes()))


def test_what_is_damaged_here_is_fetched_again(
    server: HfServer, files: dict[str, bytes], home: Path
) -> None:
    """The store and the repository's folder may share a file: neither is repaired by the other."""
    assert pulled(home, files)
    (weights,) = home.glob(f"hf/alice--large/*/{WEIGHTS}")
    damage(Store().path(rows(server)[WEIGHTS]["lfs"]))
    assert run_hub("verify").code == 3
    ran = run_hub("verify", "--repair")
    assert ran.code == 0, ran.err
    assert weights.read_bytes() == files[WEIGHTS] and pulled(home, files)
    damage(weights)
    shutil.rmtree(home / "objects")
    assert pulled(home, files) and len(Registry.read().user.content.experts) == 1


def test_what_is_fetched_takes_its_room_once(
    server: HfServer, files: dict[str, bytes], home: Path
) -> None:
    assert pulled(home, files)
    folders = {f["folder"]: f["bytes"] for f in run_hub("du", "--json").json["folders"]}
    whole = sum(map(len, files.values()))
    assert folders["objects"] >= whole and folders["hf"] < whole // 100


def test_without_links_files_are_copied(
    server: HfServer, files: dict[str, bytes], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def none(source: Any, target: Any, **options: Any) -> None:
        if not options:
            raise OSError("no links here")
        link(source, target, **options)  # a new file gets its name

    monkeypatch.setattr(store.os, "link", none)
    assert pulled(home, files)
    assert all(p.stat().st_nlink == 1 for p in Store().list_objects().values())


@pytest.mark.parametrize("how", [{"status": 500}, {"status": 502}, {"lose": True}])
def test_the_api_is_asked_again(
    server: HfServer, home: Path, expert_folder: Make, how: dict[str, Any]
) -> None:
    contents = {p.name: p.read_bytes() for p in expert_folder(1).iterdir()}
    filled(server, files=contents, name="alice/large")
    fault = server.fault("/api/models/alice/large/", times=2, **how)
    assert pulled(home, contents) and fault.hits == 2
