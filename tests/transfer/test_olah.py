"""Pulls from olah, a mirror of the Hugging Face Hub that others wrote: of git repositories, and of a Hub.

It ignores ranges of what it has in git, sends it without a length, redirects the list of files, and
answers 401 where something is missing.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, logits, run_hub
from experthub import hub
from experthub.hub.registry.expert import Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.hub.transfer.remotes import _http
from hf_clients import filled
from hf_server import HfServer
from olah_server import Olah, commit, git, lfs_object

Make = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
NUMBERS = count(1)


@dataclass(frozen=True)
class Published:
    """The repository of one test."""

    name: str
    files: dict[str, bytes]

    @property
    def source(self) -> str:
        return f"hf:alice/{self.name}"

    @property
    def weights(self) -> str:
        """The pattern of what is asked for to get its weights."""
        return rf"/{self.name}/resolve/.*{WEIGHTS}"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.files[WEIGHTS]).hexdigest()

    def pulled(self, home: Path, ran: Ran) -> bool:
        """Return whether a pull brought exactly its files, and left nothing half-done."""
        assert ran.code == 0, ran.err
        (entry,) = ran.json["pulled"]
        names = Store().read_identity(entry["digest"]).files
        assert set(names) == set(self.files) - {"README.md"} and not partial(home)
        return all(
            Store().verify_file(entry["digest"], n).read_bytes() == self.files[n] for n in names
        )

    def begun(self, home: Path) -> None:
        """An earlier pull of the weights stopped."""
        (home / "partial").mkdir(parents=True)
        (home / "partial" / self.sha256).write_bytes(self.files[WEIGHTS][:5000])


def partial(home: Path) -> list[Path]:
    return [*(home / "partial").iterdir()]


def refused(ran: Ran, code: int, words: str) -> bool:
    """Return whether a pull ended with one clear error, and stored nothing."""
    assert ran.code == code, ran.err
    assert len(ran.lines("error: ")) == len(ran.lines("hint: ")) == 1
    assert not Store().list_objects() and not Registry.read().user.content.experts
    return ran.out == "" and words in ran.err and "Traceback" not in ran.err


@pytest.fixture
def published(expert_folder: Make) -> Published:
    number = next(NUMBERS)
    files = {p.name: p.read_bytes() for p in expert_folder(number, rank=8).iterdir()}
    return Published(f"exp-{number}", files | {"README.md": b"# An expert\n"})


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove proxies, tokens and long waits."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN_PATH", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setattr(_http, "WAIT", 0.001)


# Repositories of git and git-lfs, offline.


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Olah]:
    with Olah(tmp_path_factory.mktemp("mirror")) as olah:
        yield olah


@pytest.fixture
def repository(mirror: Olah, published: Published, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published files as a git repository, which the mirror serves."""
    monkeypatch.setenv("HF_ENDPOINT", mirror.url)
    folder = mirror.folder / "mirrors" / "models" / "alice" / published.name
    commit(folder, published.files)
    return folder


def test_every_revision_of_a_git_repository(
    repository: Path, published: Published, home: Path
) -> None:
    old = git(repository, "rev-parse", "HEAD")
    git(repository, "tag", "-a", "v1", "-m", "v1")
    new = commit(repository, {"README.md": b"# Another\n"})
    for revision, expected in (("", new), ("@main", new), ("@v1", old), (f"@{old}", old)):
        shutil.rmtree(home, ignore_errors=True)
        ran = run_hub("pull", published.source + revision, "--json")
        assert published.pulled(home, ran), revision
        expert = Registry.read().find_expert(Reference.parse(published.name))
        assert expert.sources == [f"{published.source}@{expected}"]


def test_a_pull_goes_on_where_ranges_are_ignored(
    repository: Path, published: Published, home: Path
) -> None:
    """The server sends the whole file; the beginning that was fetched is not in it twice."""
    published.begun(home)
    assert published.pulled(home, run_hub("pull", published.source, "--json"))


def test_what_a_mirror_lacks(repository: Path, published: Published) -> None:
    absent = "does not exist, or is private"
    for source in ("hf:alice/none", f"{published.source}@none"):
        assert refused(run_hub("pull", source), 4, f"{source} {absent}")
    source = f"{published.source}@{'0' * 40}"
    assert refused(run_hub("pull", source), 1, f"{source} answered 500")


def test_an_object_that_is_lost_or_damaged(
    repository: Path, published: Published, home: Path
) -> None:
    path, content = lfs_object(repository, published.sha256), published.files[WEIGHTS]
    path.unlink()
    assert refused(run_hub("pull", published.source), 1, "answered 500")
    for wrong in (flip(content), content[:-100], content + b"x"):
        path.write_bytes(wrong)
        ran = run_hub("pull", published.source)
        assert refused(ran, 3, f"expected {published.sha256[:12]}") and not partial(home)
    path.write_bytes(content)
    assert published.pulled(home, run_hub("pull", published.source, "--json"))


def test_a_recipe_of_a_base_and_an_expert_from_a_mirror(
    repository: Path, published: Published, base_folder: Path, tmp_path: Path
) -> None:
    folder = repository.with_name("base")
    commit(folder, {p.name: p.read_bytes() for p in base_folder.iterdir()})
    local = tmp_path / "local"
    local.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (local / name).write_bytes(published.files[name])
    recipe: dict[str, Any] = {"merge": {"method": "linear"}}
    here = hub.compose(recipe | {"base": str(base_folder), "experts": [str(local)]})
    there = hub.compose(recipe | {"base": "hf:alice/base", "experts": [published.source]})
    assert logits(here.model).equal(logits(there.model))


# A Hub behind a cache.


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HfServer]:
    with HfServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, upstream: HfServer) -> Iterator[Olah]:
    with Olah(tmp_path_factory.mktemp("proxy"), upstream.url) as olah:
        yield olah


@pytest.fixture
def behind(
    proxy: Olah, upstream: HfServer, published: Published, monkeypatch: pytest.MonkeyPatch
) -> HfServer:
    """The Hub that has the published files, behind the cache."""
    monkeypatch.setenv("HF_ENDPOINT", proxy.url)
    filled(upstream, files=published.files, name=f"alice/{published.name}")
    upstream.requests.clear()
    return upstream


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_second_pull_is_served_by_the_cache(
    behind: HfServer, published: Published, home: Path
) -> None:
    assert published.pulled(home, run_hub("pull", published.source, "--json"))
    assert behind.seen(published.weights, "GET")
    shutil.rmtree(home)
    behind.requests.clear()
    assert published.pulled(home, run_hub("pull", published.source, "--json"))
    assert behind.requests and not behind.seen("/resolve/", "GET")


def test_a_pull_through_the_cache_goes_on(
    proxy: Olah, behind: HfServer, published: Published, home: Path
) -> None:
    """The rest is asked for as a range, which the cache knows."""
    published.begun(home)
    assert published.pulled(home, run_hub("pull", published.source, "--json"))
    assert re.search(rf'{published.weights} HTTP/1.1" 206 Partial', proxy.said)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"status": 503}, {"cut": 1000}, {"change": lambda b: b[:-100]}])
def test_what_passes_behind_the_cache_is_tried_again(
    behind: HfServer, published: Published, home: Path, how: dict[str, Any]
) -> None:
    fault = behind.fault(published.weights, times=1, **how)
    assert published.pulled(home, run_hub("pull", published.source, "--json"))
    assert fault.hits == 1


def test_a_cache_that_keeps_what_is_damaged(
    behind: HfServer, published: Published, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves other bytes of the right size for ever; they are never taken in."""
    fault = behind.fault(published.weights, times=1, change=flip)
    for _ in range(2):
        ran = run_hub("pull", published.source)
        assert refused(ran, 3, f"expected {published.sha256[:12]}") and not partial(home)
    assert fault.hits == 1 and len(behind.seen(published.weights, "GET")) == 1
    monkeypatch.setenv("HF_ENDPOINT", behind.url)
    assert published.pulled(home, run_hub("pull", published.source, "--json"))


@pytest.mark.slow
def test_a_private_repository_behind_the_cache(
    behind: HfServer, published: Published, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token reaches the Hub; what the cache keeps of it is not for others."""
    behind.store.repository(f"alice/{published.name}").save(private=True)
    for token in ("", "hf_other", "hf_write", "", "hf_other"):
        monkeypatch.setenv("HF_TOKEN", token)
        ran = run_hub("pull", published.source, "--json")
        if token == "hf_write":
            assert published.pulled(home, ran)
        else:
            assert refused(ran, 4, f"{published.source} does not exist, or is private")
        assert not token or token not in ran.err
        shutil.rmtree(home, ignore_errors=True)
    sent = {r.headers.get("authorization") for r in behind.seen(published.weights)}
    assert sent == {"Bearer hf_write"}


def test_what_the_hub_behind_a_cache_lacks(behind: HfServer, published: Published) -> None:
    lacking = f"{published.source}@none", f"{published.source}@{'0' * 40}", "hf:alice/none"
    for source in lacking:
        assert refused(run_hub("pull", source), 4, f"{source} does not exist, or is private")


@pytest.mark.slow
def test_a_hub_behind_a_cache_that_is_down(
    behind: HfServer, published: Published, home: Path
) -> None:
    behind.stop()
    assert refused(run_hub("pull", published.source), 1, f"{published.source} answered 504")
    behind.start()
    assert published.pulled(home, run_hub("pull", published.source, "--json"))
