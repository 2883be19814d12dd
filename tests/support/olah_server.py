"""olah, a mirror of the Hugging Face Hub that others wrote, in a process and an environment of its own.

`make peers` installs it.  It serves git repositories below a folder, or a Hub that it asks and caches.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
AUTHOR = ("-c", "user.name=alice", "-c", "user.email=alice@example.org")


def olah_python() -> Path:
    """The interpreter of olah's environment; without it the test is skipped, or fails if it must not be."""
    python = ROOT / "build" / "peers" / "olah" / "bin" / "python"
    if not (python.parent.parent / ".installed").is_file():
        missing = "olah is not installed: make peers"
        if os.environ.get("HUB_PEERS") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    return python


class Olah:
    """A running olah, on a port that the system chose.

    folder: of its configuration, cache and logs; it serves what is below `mirrors` there.
    upstream: the Hub that it asks for anything else; by default it asks nobody.
    """

    def __init__(self, folder: Path, upstream: str = "") -> None:
        self.folder, self.log = folder, [""]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "olah.toml").write_text(
            f"""
[basic]
host = "127.0.0.1"
port = 0
repos-path = "./repos"
mirrors-path = ["./mirrors"]
hf-scheme = "http"
hf-netloc = "{upstream.removeprefix("http://") or "127.0.0.1:9"}"
[accessibility]
offline = {str(not upstream).lower()}
"""
        )
        unset = ("PYTHONPATH", "HF_ENDPOINT", "HF_TOKEN")
        variables = {k: v for k, v in os.environ.items() if k not in unset}
        variables = {k: v for k, v in variables.items() if not k.lower().endswith("_proxy")}
        self.process = subprocess.Popen(
            [olah_python(), "-m", "olah.server", "-c", "olah.toml"],
            cwd=folder,
            env=variables | {"HOME": str(folder), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.listening = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        assert self.listening.wait(60) and self.process.poll() is None, self.said
        self.url = re.findall(r"running on (http://[\d.:]+)", self.said)[0]

    @property
    def said(self) -> str:
        return "".join(self.log)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.log.append(line)
            if "running on http" in line:
                self.listening.set()
        self.listening.set()

    def __enter__(self) -> Olah:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()


def git(folder: Path, *words: str) -> str:
    """Run a git command in a folder, and return its output."""
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *AUTHOR, *words],
        cwd=folder,
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def commit(repository: Path, files: dict[str, bytes]) -> str:
    """A commit of these files, the safetensors as git-lfs keeps them: pointers, and objects beside."""
    if not (repository / ".git").is_dir():
        repository.mkdir(parents=True)
        git(repository, "init", "-q", "-b", "main")
    for name, content in files.items():
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            path = lfs_object(repository, digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            content = POINTER.format(digest, len(content)).encode()
        (repository / name).write_bytes(content)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "change")
    return git(repository, "rev-parse", "HEAD")


def lfs_object(repository: Path, digest: str) -> Path:
    return repository / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
