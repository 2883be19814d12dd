"""The files of the test Hub: repositories of immutable commits, blobs and half-done uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

ATTRIBUTES = "".join(
    f"*.{end} filter=lfs diff=lfs merge=lfs -text\n"
    for end in ("bin", "gguf", "npz", "onnx", "parquet", "pt", "pth", "safetensors", "tar", "zip")
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
PIECE = 1 << 18


class Refused(Exception):
    """An answer that is an error: its status, `X-Error-Code` and `X-Error-Message`."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class File:
    """A file of a commit; `oid` is that of git, so of the pointer when the content is LFS."""

    size: int
    oid: str
    lfs: str | None = None

    @property
    def etag(self) -> str:
        return self.lfs or self.oid

    @property
    def pointer(self) -> int:
        return len(POINTER.format(self.lfs, self.size))


@dataclass(frozen=True)
class Draft:
    """A file that has no name yet."""

    path: Path
    size: int
    sha256: str
    md5: str

    def keep(self, path: Path) -> None:
        """Give it its name, and make that last."""
        self.path.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def git_oid(content: bytes) -> str:
    """The name git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def drafted(folder: Path, pieces: Iterable[bytes]) -> Draft:
    """Write a new file under a temporary name; nothing stays when the pieces break off."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{secrets.token_hex(8)}.tmp"
    sha256, md5 = hashlib.sha256(), hashlib.md5()
    try:
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                sha256.update(piece)
                md5.update(piece)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Draft(path, size, sha256.hexdigest(), md5.hexdigest())


def write(path: Path, content: bytes) -> None:
    """A file that appears whole or not at all."""
    drafted(path.parent, [content]).keep(path)


def pieces_of(paths: Iterable[Path]) -> Iterator[bytes]:
    """The content of files, one after the other."""
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece


def checked(path: str) -> str:
    """The path of a file in a commit, as git would take it."""
    parts = path.split("/")
    if not path or {"", ".", "..", ".git"} & set(parts) or "\\" in path or "\0" in path:
        raise Refused(400, f"Invalid path: {path!r}")
    return path


class Repository:
    """A folder of commits, of git and LFS blobs, and one file with all that changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = f"{folder.parent.name}/{folder.name}"

    @property
    def exists(self) -> bool:
        return (self.folder / "repo.json").is_file()

    @property
    def state(self) -> dict[str, Any]:
        """Visibility, creation, branches and tags."""
        state: dict[str, Any] = json.loads((self.folder / "repo.json").read_bytes())
        return state

    def save(self, **changes: Any) -> None:
        state = self.state if self.exists else {}
        write(self.folder / "repo.json", json.dumps(state | changes, indent=1).encode())

    def lfs(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256

    def content(self, file: File) -> Path:
        """Return the path of a file's bytes."""
        return self.lfs(file.lfs) if file.lfs else self.folder / "git" / file.oid

    def revision(self, name: str) -> str:
        """The commit that a branch, a tag, a full reference or a commit is."""
        state = self.state
        refs = {f"refs/tags/{tag}": oid for tag, oid in state["tags"].items()}
        refs |= {f"refs/heads/{branch}": oid for branch, oid in state["branches"].items()}
        for full in (f"refs/heads/{name}", f"refs/tags/{name}", name):
            if full in refs:
                return str(refs[full])
        if re.fullmatch("[0-9a-f]{40}", name) and (self.folder / f"commits/{name}.json").is_file():
            return name
        raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def commit(self, oid: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / f"commits/{oid}.json").read_bytes())
        return record

    def history(self, oid: str | None) -> Iterator[dict[str, Any]]:
        """A commit and what came before it, the newest first."""
        while oid:
            record = self.commit(oid)
            yield {"id": oid} | record
            oid = record["parent"]

    def files(self, oid: str) -> dict[str, File]:
        return {path: File(**file) for path, file in self.commit(oid)["files"].items()}

    def append(
        self, branch: str, author: str, header: dict[str, Any], lines: list[dict[str, Any]]
    ) -> str:
        """Add a commit to a branch: everything in it, or nothing."""
        branches = self.state["branches"]
        parent = branches.get(branch.removeprefix("refs/heads/"))
        if parent is None and branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if header.get("parentCommit") not in (None, parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = self.files(parent) if parent else {}
        for line in lines:
            self._apply(files, line["key"], line["value"])
        for path in files:
            if taken := set(accumulate(path.split("/")[:-1], "{}/{}".format)) & files.keys():
                raise Refused(400, f"{taken.pop()} is a file and a folder")
        record = {
            "parent": parent,
            "author": author,
            "title": header["summary"],
            "message": header.get("description", ""),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
            "files": {path: asdict(files[path]) for path in sorted(files)},
        }
        content = json.dumps(record, indent=1).encode()
        oid = hashlib.sha1(content + secrets.token_bytes(8)).hexdigest()
        write(self.folder / f"commits/{oid}.json", content)
        self.save(branches=branches | {branch.removeprefix("refs/heads/"): oid})
        return oid

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        """One line of a commit."""
        path = value["path"]
        if key == "file":
            content = value["content"].encode()
            if value.get("encoding") == "base64":
                content = base64.b64decode(content, validate=True)
            files[checked(path)] = File(len(content), git_oid(content))
            write(self.folder / "git" / git_oid(content), content)
        elif key == "lfsFile":
            blob = self.lfs(value["oid"])
            if not re.fullmatch("[0-9a-f]{64}", value["oid"]) or not blob.is_file():
                raise Refused(400, f"LFS pointer of {path} points to a file that does not exist")
            size = blob.stat().st_size
            if value.get("size", size) != size:
                raise Refused(400, f"{path} has {size} bytes, not {value['size']}")
            pointer = POINTER.format(value["oid"], size).encode()
            files[checked(path)] = File(size, git_oid(pointer), value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.strip('/')}/"
            gone = [p for p in files if p == path or (key[7:] == "Folder" and p.startswith(folder))]
            for name in gone:
                del files[name]
            if not gone:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise Refused(400, f"Unknown key in a commit: {key!r}")


class Store:
    """All repositories and uploads below one folder; a new one on the same folder sees the same."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()

    def repository(self, name: str) -> Repository:
        """The repository of that name, which need not exist."""
        if not REPOSITORY.fullmatch(name) or ".." in name:
            raise Refused(400, f"Invalid repository name: {name!r}")
        return Repository(self.root / "repos" / name)

    def create(self, name: str, private: bool) -> Repository:
        """A new repository, with the first commit that the Hub makes."""
        made = self.repository(name)
        created = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        made.save(private=private, gated=False, created=created, branches={}, tags={})
        value = {"path": ".gitattributes", "content": ATTRIBUTES, "encoding": "utf-8"}
        line = {"key": "file", "value": value}
        made.append("main", name.split("/")[0], {"summary": "initial commit"}, [line])
        return made

    def delete(self, repository: Repository) -> None:
        gone = self.root / f"gone-{secrets.token_hex(4)}"
        repository.folder.rename(gone)
        shutil.rmtree(gone)

    def begin(self, repo: str, oid: str, size: int, chunk: int | None) -> str:
        """A place to upload one object to: the key of its address."""
        key = secrets.token_hex(16)
        record = {"repo": repo, "oid": oid, "size": size, "chunk": chunk}
        write(self.root / "uploads" / key / "upload.json", json.dumps(record).encode())
        return key

    def upload(self, key: str) -> dict[str, Any]:
        try:
            content = (self.root / "uploads" / key / "upload.json").read_bytes()
        except FileNotFoundError:
            raise Refused(403, "Request has expired") from None
        record: dict[str, Any] = json.loads(content)
        return record

    def put(self, key: str, pieces: Iterable[bytes]) -> str:
        """Take a whole object, when it is the one that was announced; its etag."""
        record = self.upload(key)
        blob = self.repository(record["repo"]).lfs(record["oid"])
        draft = drafted(blob.parent, pieces)
        if (draft.sha256, draft.size) != (record["oid"], record["size"]):
            draft.path.unlink()
            raise Refused(400, "The body is not the object that was announced")
        draft.keep(blob)
        return draft.md5

    def put_part(self, key: str, number: int, pieces: Iterable[bytes]) -> str:
        """Take one part of an object; its etag."""
        record = self.upload(key)
        folder = self.root / "uploads" / key
        draft = drafted(folder, pieces)
        chunk = record["chunk"]
        if not chunk or draft.size != min(chunk, record["size"] - (number - 1) * chunk):
            draft.path.unlink()
            raise Refused(400, f"Part {number} has a wrong size")
        draft.keep(folder / f"{number}-{draft.md5}")
        return draft.md5

    def complete(self, key: str, parts: list[dict[str, Any]]) -> None:
        """Put the parts together."""
        record = self.upload(key)
        folder = self.root / "uploads" / key
        names = [f"{part['partNumber']}-{part['etag'].strip(chr(34))}" for part in parts]
        numbers = [part["partNumber"] for part in parts]
        count = ceil(record["size"] / record["chunk"]) if record["chunk"] else 0
        paths = [folder / name for name in names if re.fullmatch(r"\d+-[0-9a-f]{32}", name)]
        whole = numbers == [*range(1, count + 1)] and len(paths) == count
        if not whole or not all(path.is_file() for path in paths):
            raise Refused(400, "One or more of the specified parts could not be found")
        self.put(key, pieces_of(paths))
