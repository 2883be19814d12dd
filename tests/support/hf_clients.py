"""The real clients of the test Hub, each in a process and with a cache of its own."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from experthub.hub.files.atomic import hub_home
from hf_server import HfServer
from hf_store import write

PEERS = hub_home() / "peers"  # read before a test has a hub home of its own
OLD = "1.33.0"
REPO = "alice/expert"
WEIGHTS = "adapter_model.safetensors"
START = """
import hashlib, json
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()
repo, folder = "alice/expert", Path("up")
add = lambda path, content: CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
def commit(*operations, **options):
    return api.create_commit(repo, list(operations), commit_message="change", **options).oid
def read(root):
    paths = [p for p in Path(root).rglob("*") if p.is_file() and ".cache" not in p.parts]
    return {p.relative_to(root).as_posix(): p.read_bytes().hex() for p in paths}
def error(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (*HfHubHTTPError.__bases__, ValueError) as e:
        return [type(e).__name__, getattr(getattr(e, "response", None), "status_code", None)]
"""
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# An expert\n",
    "adapter_config.json": b'{"r": 4}',
    WEIGHTS: random.Random(1).randbytes(3_000_000),
    "empty.txt": b"",
    "sub/a name, \xc3\xa4 100%.txt".encode("latin1").decode(): b"text\r\n",
}
HEX = {name: content.hex() for name, content in FILES.items()}
CLIENTS = ["installed", pytest.param(OLD, marks=pytest.mark.slow)]


@dataclass
class Client:
    """A Python with some huggingface_hub, which runs scripts in a folder with a cache of its own."""

    python: str
    folder: Path
    hub: HfServer

    @property
    def old(self) -> bool:
        return self.python != sys.executable

    def start(self, script: str, token: str = "hf_write") -> subprocess.Popen[str]:
        """Start a script that leaves something in `result`."""
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment |= {"HF_ENDPOINT": self.hub.url, "HF_HOME": "hf", "HF_TOKEN": token}
        for name in ("XET", "TELEMETRY", "PROGRESS_BARS"):
            environment[f"HF_HUB_DISABLE_{name}"] = "1"
        code = f"{START}{script}\nprint(json.dumps(result))"
        command = [self.python, "-c", code]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    def __call__(self, script: str, token: str = "hf_write") -> Any:
        """Run a script, and return its variable `result`."""
        return finished(self.start(script, token))

    def forget(self) -> None:
        """Remove its cache."""
        shutil.rmtree(self.folder / "hf", ignore_errors=True)


def finished(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@cache
def old_python() -> str | None:
    """A Python with the last 1.x, in an environment that stays; None where pip cannot make it."""
    folder = PEERS / f"huggingface_hub-{OLD}"
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", draft], check=True)
            install = ["-m", "pip", "install", "-q", f"huggingface_hub=={OLD}"]
            subprocess.run([draft / "bin" / "python", *install], check=True, timeout=600)
            draft.rename(folder)
        except (subprocess.SubprocessError, OSError):
            shutil.rmtree(draft, ignore_errors=True)
            return None
    return str(folder / "bin" / "python")


def connected(version: str, hub: HfServer, folder: Path) -> Client:
    """A client, with something to push in its folder."""
    python = old_python() if version == OLD else sys.executable
    if python is None:
        pytest.skip(f"huggingface_hub {OLD} cannot be installed here")
    (folder / "up" / "sub").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / "up" / name).write_bytes(content)
    return Client(python, folder, hub)


def filled(
    hub: HfServer, private: bool = False, files: dict[str, bytes] = FILES, name: str = REPO
) -> str:
    """Put files on the Hub, safetensors as large ones; their commit."""
    repo = hub.store.create(name, private)
    changes: list[dict[str, Any]] = []
    for path, content in files.items():
        large = path.endswith(".safetensors")
        value = {"path": path, "content": b64encode(content).decode(), "encoding": "base64"}
        if large:
            value = {"path": path, "oid": hashlib.sha256(content).hexdigest()}
            write(repo.lfs(value["oid"]), content)
        changes.append({"key": "lfsFile" if large else "file", "value": value})
    return repo.append("main", "alice", {"summary": "filled"}, changes)


def raw(hub: HfServer, method: str, path: str, token: str = "hf_write", **how: Any) -> Any:
    """A request of a client that we write ourselves."""
    headers = how.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    with httpx.Client(trust_env=False, timeout=60) as session:
        return session.request(method, f"{hub.url}{path}", headers=headers, **how)


def lines(*operations: tuple[str, dict[str, Any]], **header: str) -> str:
    """The body of a commit."""
    all_lines = [("header", {"summary": "raw"} | header), *operations]
    return "\n".join(json.dumps({"key": key, "value": value}) for key, value in all_lines)
