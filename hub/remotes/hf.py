"""Model repositories of the Hugging Face Hub, read with every byte checked.

The Hub's own client checks sizes, not digests, and begins again after a crash; so files are fetched
here, ranged and resumable, against the digests that the repository's tree states: sha256 for large
files, git's sha1 of a blob for the others.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin

from experthub.hub._files import locked, sha256_of, sync_file, sync_folder, write_json, write_text
from experthub.hub.errors import AuthError, HubError, IntegrityError, NotFoundError, UsageError
from experthub.hub.formats.adapter import read_json
from experthub.hub.remotes._http import (
    Progress,
    ask,
    check_online,
    client,
    download,
    fetch_small,
    is_offline,
    quiet,
    shown,
)

if TYPE_CHECKING:
    import httpx

MODEL = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
EXPERT = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "task_vector.safetensors",
    "phatgoose_gates.safetensors",
    "expert.json",
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SMALL = 8 << 20  # bytes of a file that is no large file of the repository
LARGEST = 1 << 40
ENTRIES = 10_000
AT_ONCE = 4
COMMIT, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


@dataclass(frozen=True)
class HfSource:
    """`hf:org/name[@revision]`; the revision is a branch, a tag or a commit, `main` by default."""

    repository: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> HfSource:
        found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+|[\w.-]+)(?:@([\w./-]+))?", text)
        if not found or ".." in text or "--" in found.group(1):
            raise UsageError(f"{text!r} is no source", "write hf:org/name or hf:org/name@revision")
        return cls(found.group(1), found.group(2) or "main")

    def api(self, path: str) -> str:
        return f"{endpoint()}/api/models/{self.repository}/{path}"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: sha256 is known for large ones, blob is git's sha1 of the others."""

    name: str
    size: int
    blob: str
    sha256: str | None


def endpoint() -> str:
    """Where the Hub is: `HF_ENDPOINT`, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token() -> str | None:
    """The user's token, as the Hub's own tools keep it: a variable or a file."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    stated = os.environ.get("HF_TOKEN", "").strip()
    if stated or not path.is_file():
        return stated or None
    return path.read_text(encoding="utf-8").strip() or None


def headers() -> dict[str, str]:
    """What every request to the Hub carries; httpx drops the token on the way to another host."""
    known = token()
    return {"Authorization": f"Bearer {known}"} if known else {}


def fetch(
    source: str, folder: Path, patterns: tuple[str, ...] = MODEL, progress: Progress = quiet
) -> Path:
    """A folder with a repository's files at one commit; files of other names are left out.

    folder: where repositories are kept, one folder per commit.  A commit that is there needs no
    request.  Raises UsageError, NotFoundError, AuthError, and IntegrityError for bytes that are
    not those of the digests.
    """
    return _fetch(source, folder, patterns, progress)[0]


def fetch_expert(
    source: str, folder: Path, progress: Progress = quiet
) -> tuple[Path, dict[str, str]]:
    """An expert's folder, and the sha256 of its files, of which every byte was read just now.

    One that was here, and is not as it came, is fetched again.
    """
    target, hashed = _fetch(source, folder, EXPERT, progress)
    if hashed:
        return target, hashed
    hashed = {path.name: sha256_of(path) for path in target.iterdir()}
    came = _record(target)
    if came.is_file() and read_json(came) != hashed:
        check_online(f"{source}, as it came,")
        shutil.rmtree(target)
        return _fetch(source, folder, EXPERT, progress)
    return target, hashed


def _record(target: Path) -> Path:
    """Where the digests of a repository's files are kept."""
    return target.with_name(f"{target.name}.json")


def _fetch(
    source: str, folder: Path, patterns: tuple[str, ...], progress: Progress
) -> tuple[Path, dict[str, str]]:
    """A repository's folder; if it was not here, with the sha256 of its files."""
    place = HfSource.parse(source)
    kind = hashlib.sha256("\0".join(patterns).encode()).hexdigest()[:8]
    mine = folder / place.repository.replace("/", "--")
    remembered = mine / "refs" / place.revision.replace("/", "--")
    commit = place.revision if COMMIT.fullmatch(place.revision) else None
    if commit is None and is_offline() and remembered.is_file():
        commit = remembered.read_text(encoding="utf-8").strip()
    if commit and (mine / f"{commit}-{kind}").is_dir():
        return mine / f"{commit}-{kind}", {}
    check_online(source)
    hashed: dict[str, str] = {}
    with client(headers=headers()) as session:
        commit = _commit(session, place, source)
        target = mine / f"{commit}-{kind}"
        with locked(folder.parent / "locks" / f"hf-{mine.name}"):
            if not target.is_dir():
                files = list(_files(session, place, commit, patterns, source))
                partial = folder.parent / "partial"
                hashed = _fetch_all(session, place, commit, files, target, partial, progress)
    write_text(remembered, commit + "\n")
    return target, hashed


def _commit(session: httpx.Client, place: HfSource, source: str) -> str:
    """The commit that a revision is now."""
    answer = _ask(session, place.api(f"revision/{quote(place.revision, safe='')}"), source)
    commit = _json(answer).get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubError(f"{source}: the server names no commit", "check HF_ENDPOINT")
    return commit


def _files(
    session: httpx.Client, place: HfSource, commit: str, patterns: tuple[str, ...], source: str
) -> Iterator[RemoteFile]:
    """The files at the top of a repository whose names are asked for, with their digests."""
    url: str | None = place.api(f"tree/{commit}?recursive=false&expand=false")
    seen: set[str] = set()
    count, pickles = 0, []
    while url:
        answer = _ask(session, url, source)
        rows = _json(answer)
        if not isinstance(rows, list):
            raise HubError(f"{source}: its list of files is none", "check HF_ENDPOINT")
        for row in rows:
            count += 1
            if count > ENTRIES:
                raise HubError(f"{source} has more than {ENTRIES} files", "is it a model?")
            name = row.get("path") if isinstance(row, dict) else None
            if not isinstance(name, str) or row.get("type") != "file":
                continue
            if name.endswith(PICKLES):
                pickles.append(name)
            if NAME.fullmatch(name) and any(fnmatchcase(name, pattern) for pattern in patterns):
                if name.lower() in seen:
                    raise IntegrityError(f"{source} has two files {name!r}", "use another revision")
                seen.add(name.lower())
                yield _remote_file(name, row, source)
        following = answer.links.get("next", {}).get("url")
        url = urljoin(str(answer.url), following) if following else None
    if not any(name.endswith(".safetensors") for name in seen):
        only = f": only {pickles[0]}, and pickles are never read" if pickles else ""
        raise IntegrityError(f"{source} has no safetensors{only}", "ask its owner to convert it")


def _remote_file(name: str, row: dict[str, Any], source: str) -> RemoteFile:
    """A row of the tree, checked: nothing that a server says becomes a path or a size unchecked."""
    large = row.get("lfs")
    size = large.get("size") if isinstance(large, dict) else row.get("size")
    sha256 = str(large.get("oid", "")).removeprefix("sha256:") if isinstance(large, dict) else None
    blob = row.get("oid")
    wrong = (
        not isinstance(size, int)
        or not 0 <= size <= (SMALL if sha256 is None else LARGEST)
        or (sha256 is not None and not SHA256.fullmatch(sha256))
        or (sha256 is None and not (isinstance(blob, str) and COMMIT.fullmatch(blob)))
    )
    if wrong:
        raise IntegrityError(f"{source}: {name} has no usable size and digest", "check HF_ENDPOINT")
    return RemoteFile(name, int(size or 0), str(blob), sha256)


def _fetch_all(
    session: httpx.Client,
    place: HfSource,
    commit: str,
    files: list[RemoteFile],
    target: Path,
    partial: Path,
    progress: Progress,
) -> dict[str, str]:
    """Fetch files, several at a time, into a folder that appears when all of them are there.

    Until then it is a draft, and what is whole in it is not fetched again.  Returns their sha256.
    """
    done = dict.fromkeys((file.name for file in files), 0)
    size = sum(file.size for file in files)
    draft = target.with_name(f".{target.name}")
    draft.mkdir(parents=True, exist_ok=True)

    def fetch_one(file: RemoteFile) -> str:
        def note(bytes_done: int, _: int) -> None:
            done[file.name] = bytes_done
            progress(sum(done.values()), size)

        path = draft / file.name
        url = f"{endpoint()}/{place.repository}/resolve/{commit}/{quote(file.name)}"
        if file.sha256 is None:
            content = fetch_small(session, url, file.size)
            if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != file.blob:
                raise IntegrityError(
                    f"{shown(url)} is not the file that its repository lists",
                    "it was changed on its way or at its source; try again",
                )
            path.write_bytes(content)
            found = hashlib.sha256(content).hexdigest()
        elif path.is_file() and sha256_of(path) == file.sha256:
            found = file.sha256
        else:
            found = _move(url, file, partial, path, note)
        note(file.size, 0)
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        digests = list(pool.map(fetch_one, files))
    hashed = {file.name: sha256 for file, sha256 in zip(files, digests, strict=True)}
    for path in draft.iterdir():
        sync_file(path) if path.name in hashed else path.unlink()
    write_json(_record(target), hashed)
    draft.rename(target)
    sync_folder(target.parent)
    return hashed


def _move(url: str, file: RemoteFile, partial: Path, target: Path, note: Progress) -> str:
    """Download a large file to where it belongs; its sha256.

    Another process that wants the same content, of another repository, may take it away first.
    """
    sha256 = str(file.sha256)
    while True:
        got = download(url, sha256, partial, note, headers=headers(), size=file.size)
        try:
            got.rename(target)
        except FileNotFoundError:
            continue
        return sha256


def _ask(session: httpx.Client, url: str, source: str) -> httpx.Response:
    """An answer of the Hub; its errors in words."""
    answer = ask(session, url)
    if answer.is_success:
        return answer
    code, status = answer.headers.get("X-Error-Code", ""), answer.status_code
    if code == "GatedRepo":
        raise AuthError(f"{source} is gated", "ask for access and set HF_TOKEN")
    if code in ("RepoNotFound", "RevisionNotFound") or status == 404:
        raise NotFoundError(
            f"{source} does not exist, or is private", "check the name, or set HF_TOKEN"
        )
    if status in (401, 403):
        raise AuthError(f"{source} answered {status}", "check HF_TOKEN")
    raise HubError(f"{source} answered {status}", "try again later, or check HF_ENDPOINT")


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise HubError(f"{shown(answer.url)} is no JSON", "check HF_ENDPOINT") from None
