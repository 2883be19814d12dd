"""Faults and refusals of the test Hub, and how the real clients handle them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_clients import (
    CLIENTS,
    FILES,
    HEX,
    REPO,
    WEIGHTS,
    Client,
    connected,
    filled,
    finished,
    lines,
    raw,
)
from hf_server import HfServer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HfServer]:
    with HfServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, hub: HfServer, tmp_path: Path) -> Client:
    return connected(request.param, hub, tmp_path / "client")


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


PUSH = """
api.create_repo(repo, private=True)
result = api.upload_folder(repo_id=repo, folder_path=folder).oid
"""
# What becomes of one answer to GET, and what the clients of both versions make of it.
FAULTS: dict[str, tuple[dict[str, Any], Any, list[int]]] = {
    "cut": ({"cut": 1_000_000}, "same", [200, 200]),
    "short": ({"change": lambda body: body[:-5]}, ["OSError", None], [200]),
    "long": ({"change": lambda body: body + b"12345"}, ["OSError", None], [200]),
    "wrong": ({"change": flip}, "other", [200]),
    "length too large": ({"length": 3_000_005}, "same", [200, 200]),
    "length too small": ({"length": 2_999_995}, ["OSError", None], [200]),
    "slow": ({"pause": 0.05, "piece": 1_000_000}, "same", [200]),
    "busy": ({"status": 429, "headers": {"Retry-After": "0"}}, "same", [429, 200]),
    "down": ({"status": 503, "headers": {"Retry-After": "0"}}, ["HfHubHTTPError", 503], [503]),
    "lost": ({"lose": True}, "same", [None, 200]),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_download(client: Client, hub: HfServer, name: str) -> None:
    filled(hub)
    how, outcome, statuses = FAULTS[name]
    fault = hub.fault(f"/resolve/.*{WEIGHTS}", times=1, **how)
    assert outcome == client(f"""
path = Path("hf") / "got"
result = error(api.hf_hub_download, repo, "{WEIGHTS}", local_dir=path)
if result is None:
    same = (path / "{WEIGHTS}").read_bytes() == (folder / "{WEIGHTS}").read_bytes()
    result = "same" if same else "other"
""")
    assert fault.hits == 1
    assert [r.status for r in hub.seen("/resolve/", "GET")] == statuses


def test_a_download_goes_on_in_the_same_process(client: Client, hub: HfServer) -> None:
    filled(hub)
    big = b"".join(FILES[WEIGHTS] for _ in range(4))
    (client.folder / "big.safetensors").write_bytes(big)
    pull = """
result = api.hf_hub_download(repo, "big.safetensors", force_download=True)
result = hashlib.sha256(Path(result).read_bytes()).hexdigest()
"""
    assert client("result = len(commit(add('big.safetensors', 'big.safetensors')))") == 40
    for ignored, second in ((False, 206), (True, 200)):
        hub.requests.clear()
        hub.faults.all.clear()
        hub.fault("/resolve/.*big", cut=11_000_000, times=1)
        hub.fault("/resolve/.*big", no_range=ignored)
        assert client(pull) == hashlib.sha256(big).hexdigest()
        gets = hub.seen("/resolve/", "GET")
        assert [r.status for r in gets] == [200, second]
        assert gets[1].headers["range"] == f"bytes={10 << 20}-", "they keep steps of 10 MiB"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_token_does_not_follow_elsewhere(client: Client, hub: HfServer, host: str) -> None:
    filled(hub)
    with HfServer(hub.store.root) as other:
        address = other.url.replace("127.0.0.1", host)
        hub.fault("/resolve/", method="GET|HEAD", redirect=address)
        files, failed = client("""
failed = error(api.snapshot_download, repo)
result = [read(next(Path("hf").rglob("snapshots/*"), "none")), failed]
""")
        followed = ["authorization" in request.headers for request in other.requests]
    assert all("authorization" in r.headers for r in hub.requests)
    if client.old and host == "127.0.0.1":
        assert failed and all(followed), "1.x takes another port for the same host"
        return
    assert failed is None and {name: files[name] for name in FILES} == HEX
    assert followed == [False] * len(FILES), "the attributes came too, the empty file did not"


LOST = ["RemoteProtocolError", None]
# One request of a push goes wrong: how often it comes, what the client says, how many commits are.
PUSHES: dict[str, tuple[dict[str, Any], int, Any, int]] = {
    "upload broken off": ({"path": "/uploads/", "method": "PUT", "take": 1_000_000}, 2, None, 2),
    "upload unanswered": ({"path": "/uploads/", "method": "PUT", "lose": True}, 2, None, 2),
    "upload put off": ({"path": "/uploads/", "method": "PUT", "status": 503}, 2, None, 2),
    "batch unanswered": ({"path": "/batch", "method": "POST", "lose": True}, 2, None, 2),
    "commit unanswered": ({"path": "/commit/", "method": "POST", "lose": True}, 1, LOST, 2),
    "commit put off": (
        {"path": "/commit/", "method": "POST", "status": 503},
        1,
        ["HfHubHTTPError", 503],
        1,
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PUSHES)
def test_faults_of_a_push(client: Client, hub: HfServer, name: str) -> None:
    how, count, outcome, commits = PUSHES[name]
    fault = hub.fault(times=1, **how)
    found = client("""
api.create_repo(repo)
result = error(api.upload_folder, repo_id=repo, folder_path=folder)
""")
    assert (found, fault.hits) == (outcome, 1)
    assert len(hub.seen(how["path"], how["method"])) == count
    repo = hub.store.repository(REPO)
    assert len(list(repo.history(repo.revision("main")))) == commits


def test_a_restart_in_the_middle_of_an_upload(client: Client, hub: HfServer) -> None:
    fault = hub.fault("/uploads/", method="PUT", wait=threading.Event(), times=1)
    process = client.start(PUSH)
    while not fault.hits and process.poll() is None:
        time.sleep(0.02)
    hub.stop()
    before = hub.port
    hub.start()
    fault.wait.set()
    commit = finished(process)
    assert hub.port == before and [r.status for r in hub.seen(method="PUT")] == [None, 200]

    hub.stop()
    with HfServer(hub.store.root, port=before) as again:
        assert again.url == hub.url
        script = "result = [api.model_info(repo).sha, read(api.snapshot_download(repo))]"
        sha, files = client(script)
        assert sha == commit and {name: files[name] for name in FILES} == HEX
        assert client("result = error(api.model_info, repo)", token="")[1] == 401, "still private"
    hub.start()
    assert not list(hub.store.root.rglob("*.tmp"))


def test_every_get_has_its_head(hub: HfServer) -> None:
    hub.store.create(REPO, private=False)
    hub.page = 0
    for path in (
        "/api/whoami-v2",
        f"/api/models/{REPO}",
        f"/api/models/{REPO}/revision/main",
        f"/api/models/{REPO}/refs",
        f"/api/models/{REPO}/commits/main",
        f"/api/models/{REPO}/tree/main",
        f"/api/models/{REPO}/tree/no",
        f"/{REPO}/resolve/main/.gitattributes",
        f"/{REPO}/resolve/main/no",
    ):
        get, head = raw(hub, "GET", path), raw(hub, "HEAD", path)
        own = ("x-request-id", "date")
        assert get.content and not head.content and get.status_code == head.status_code
        assert [h for h in get.headers.items() if h[0] not in own] == [
            h for h in head.headers.items() if h[0] not in own
        ]
        assert head.headers["x-request-id"] != get.headers["x-request-id"]


def test_parts_of_a_file(hub: HfServer) -> None:
    hub.store.create(REPO, private=False)
    path = f"/{REPO}/resolve/main/.gitattributes"
    whole = raw(hub, "GET", path)
    size, etag = len(whole.content), whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes"
    for asked, status, start, stop in (
        ("bytes=0-0", 206, 0, 1),
        ("bytes=10-", 206, 10, size),
        ("bytes=10-99999", 206, 10, size),
        ("bytes=-7", 206, size - 7, size),
        ("bytes=-99999", 206, 0, size),
        ("bytes=0-1,4-5", 200, 0, size),
        ("bytes=5-3", 200, 0, size),
        ("lines=1-2", 200, 0, size),
        (f"bytes={size}-", 416, 0, 0),
    ):
        part = raw(hub, "GET", path, headers={"Range": asked})
        assert (part.status_code, part.content) == (status, whole.content[start:stop]), asked
        spot = f"bytes {start}-{stop - 1}/{size}" if status == 206 else f"bytes */{size}"
        assert part.headers.get("content-range") == (None if status == 200 else spot)
    for known, status in ((etag, 206), ('"other"', 200)):
        asked = {"Range": "bytes=10-", "If-Range": known}
        assert raw(hub, "GET", path, headers=asked).status_code == status


def test_uploads_are_checked(hub: HfServer) -> None:
    repo = hub.store.create(REPO, private=False)
    content = b"0123456789"
    oid = hashlib.sha256(content).hexdigest()
    ask = {"operation": "upload", "objects": [{"oid": oid, "size": 10}]}

    def href() -> str:
        answer = raw(hub, "POST", f"/{REPO}.git/info/lfs/objects/batch", json=ask).json()
        return str(answer["objects"][0]["actions"]["upload"]["href"]).removeprefix(hub.url)

    to = href()
    for wrong in (b"", content[:-1], content + b"x", flip(content)):
        assert raw(hub, "PUT", to, token="", content=wrong).status_code == 400
        assert not repo.lfs(oid).exists()
    assert raw(hub, "PUT", "/uploads/" + "0" * 32, content=content).status_code == 403
    line = ("lfsFile", {"path": "a.safetensors", "algo": "sha256", "oid": oid, "size": 10})
    commit = f"/api/models/{REPO}/commit/main"
    assert raw(hub, "POST", commit, content=lines(line)).status_code == 400

    hub.multipart = 4
    to = href()
    tags = [
        raw(hub, "PUT", f"{to}/{n}", content=content[4 * n - 4 : 4 * n]).headers["etag"]
        for n in (1, 2, 3)
    ]
    assert raw(hub, "PUT", f"{to}/3", content=b"too long").status_code == 400
    parts = [{"partNumber": n, "etag": tag} for n, tag in enumerate(tags, 1)]
    for some in (parts[:2], parts[::-1], [{"partNumber": 1, "etag": tags[1]}, *parts[1:]]):
        assert raw(hub, "POST", to, json={"oid": oid, "parts": some}).status_code == 400
    assert raw(hub, "POST", to, json={"oid": oid, "parts": parts}).status_code == 200
    assert repo.lfs(oid).read_bytes() == content
    assert raw(hub, "POST", commit, content=lines(line)).status_code == 200


def test_a_commit_is_whole_or_is_not(hub: HfServer) -> None:
    repo = hub.store.create(REPO, private=False)
    head = repo.revision("main")
    good = ("file", {"path": "good", "content": "eA==", "encoding": "base64"})

    def bad(path: str) -> tuple[str, dict[str, Any]]:
        return "file", {"path": path, "content": "", "encoding": "base64"}

    commit = f"/api/models/{REPO}/commit/main"
    for line, status in (
        (bad("../x"), 400),
        (bad("/x"), 400),
        (bad("a\\b"), 400),
        (bad(".git/config"), 400),
        (bad("good/below"), 400),
        (("file", {"path": "x", "content": "?", "encoding": "base64"}), 400),
        (("lfsFile", {"path": "x", "oid": "../../repo.json", "size": 1}), 400),
        (("deletedFile", {"path": "no"}), 404),
        (("renamed", {"path": "good"}), 400),
    ):
        answer = raw(hub, "POST", commit, content=lines(good, line))
        assert answer.status_code == status, line
    for content in (b"", b"{", lines(good, parentCommit="0" * 40).encode(), b'{"key": "file"}'):
        assert raw(hub, "POST", commit, content=content).status_code in (400, 412)
    assert raw(hub, "POST", commit, token="hf_other", content=lines(good)).status_code == 403
    assert raw(hub, "POST", commit, token="", content=lines(good)).status_code == 401
    assert repo.revision("main") == head
    answer = raw(hub, "POST", commit, content=lines(good, parentCommit=head))
    assert answer.json()["commitOid"] == repo.revision("main") != head


def test_of_many_at_once_one_wins(hub: HfServer) -> None:
    repo = hub.store.create(REPO, private=False)
    head, found = repo.revision("main"), []

    def race(number: int) -> None:
        line = ("file", {"path": f"{number}", "content": "", "encoding": "base64"})
        body = lines(line, parentCommit=head)
        found.append(raw(hub, "POST", f"/api/models/{REPO}/commit/main", content=body))

    threads = [threading.Thread(target=race, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in found) == [200, 412, 412, 412]
    assert len(list(repo.history(repo.revision("main")))) == 2


def test_answers_can_be_hostile(hub: HfServer) -> None:
    hub.store.create(REPO, private=False)
    names = ["../x", "/etc/x", "a\\b", "A", "a", "x" * 300]
    tree = [{"type": "file", "oid": "../z", "size": 1 << 60, "path": name} for name in names]
    fault = hub.fault("/tree/", json=lambda _: tree, skip=1, times=1)
    pages = [raw(hub, "GET", f"/api/models/{REPO}/tree/main").json() for _ in range(3)]
    assert pages[1] == tree and pages[0] == pages[2] != tree and fault.hits == 1
    wrong = {"ETag": '"../../x"', "X-Repo-Commit": "../x", "Accept-Ranges": None}
    hub.fault("/resolve/", method="GET|HEAD", headers=wrong)
    for method in ("GET", "HEAD"):
        answer = raw(hub, method, f"/{REPO}/resolve/main/.gitattributes")
        assert answer.headers["etag"] == wrong["ETag"] and "accept-ranges" not in answer.headers
    hub.fault(f"/models/{REPO}$", json=lambda info: info | {"sha": "../../x"})
    assert raw(hub, "GET", f"/api/models/{REPO}").json()["sha"] == "../../x"
