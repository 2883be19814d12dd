"""The test Hub against the real clients, of the installed version and of the last 1.x."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hf_clients import CLIENTS, FILES, HEX, REPO, WEIGHTS, Client, connected, filled
from hf_server import HfServer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HfServer]:
    with HfServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, hub: HfServer, tmp_path: Path) -> Client:
    return connected(request.param, hub, tmp_path / "client")


def test_push_and_pull(client: Client, hub: HfServer) -> None:
    assert client(
        "result = [api.whoami()['name'], str(api.create_repo(repo)), "
        "str(api.create_repo(repo, exist_ok=True)), error(api.create_repo, repo)]"
    ) == ["alice", f"{hub.url}/{REPO}", f"{hub.url}/{REPO}", ["HfHubHTTPError", 409]]
    first, info, files = client("""
first = api.upload_folder(repo_id=repo, folder_path=folder).oid
result = [first, api.model_info(repo).sha, read(api.snapshot_download(repo))]
""")
    assert info == first
    assert files.pop(".gitattributes") and files == HEX
    (put,) = hub.seen(method="PUT")
    assert put.received == 3_000_000 and "authorization" not in put.headers

    hub.requests.clear()
    assert client("result = api.upload_folder(repo_id=repo, folder_path=folder).oid") == first
    assert not hub.seen(method="PUT") and not hub.seen("/commit/"), "nothing has changed"
    head, stale, messages, left = client(f"""
weights = (folder / "{WEIGHTS}").read_bytes()
head = commit(add("again.safetensors", weights), add("n", b"2"), parent_commit="{first}")
stale = error(commit, add("n", b"3"), parent_commit="{first}")
commit(CommitOperationDelete("sub/"), CommitOperationDelete("n"), parent_commit=head)
result = [head, stale, [c.title for c in api.list_repo_commits(repo)], api.list_repo_files(repo)]
""")
    assert stale == ["HfHubHTTPError", 412] and head != first
    assert not hub.seen(method="PUT"), "the same bytes were there under another name"
    assert len(messages) == 4 and messages[-1] == "initial commit"
    assert sorted(left) == sorted({*FILES, ".gitattributes", "again.safetensors"} - {[*FILES][-1]})
    assert client("api.delete_repo(repo); result = error(api.model_info, repo)")[1] == 404


def test_references_and_absent_things(client: Client, hub: HfServer) -> None:
    commit = filled(hub)
    found = client("""
api.create_tag(repo, tag="v1", tag_message="one")
api.create_branch(repo, branch="next/try", revision="v1")
new = commit(add("new.txt", b"new"), revision="next/try")
refs = api.list_repo_refs(repo)
result = {
    "tags": {r.name: r.target_commit for r in refs.tags},
    "branches": {r.name: r.target_commit == new for r in refs.branches},
    "exist": [api.file_exists(repo, "new.txt", revision=r) for r in ("next/try", "v1")],
    "info": api.model_info(repo, revision="v1").sha,
    "paths": [p.path for p in api.get_paths_info(repo, ["sub", "README.md", "no"])],
    "errors": [
        error(api.create_tag, repo, tag="v1"),
        error(api.model_info, repo, revision="no"),
        error(commit, add("x", b"x"), revision="no"),
        error(api.hf_hub_download, repo, "no.txt"),
        error(api.model_info, "alice/no"),
        error(commit, CommitOperationDelete("no.txt")),
    ],
}
api.delete_branch(repo, branch="next/try")
api.delete_tag(repo, tag="v1")
result["left"] = [len(api.list_repo_refs(repo).branches), len(api.list_repo_refs(repo).tags)]
""")
    assert found["tags"] == {"v1": commit} and found["info"] == commit
    assert found["branches"] == {"main": False, "next/try": True} and found["exist"] == [
        True,
        False,
    ]
    assert found["paths"] == ["sub", "README.md"] and found["left"] == [1, 0]
    assert found["errors"] == [
        ["HfHubHTTPError", 409],
        ["RevisionNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
    ]


def test_a_pinned_revision_in_the_cache_needs_no_request(client: Client, hub: HfServer) -> None:
    commit = filled(hub)
    pull = f"result = len(read(api.snapshot_download(repo, revision='{commit}')))"
    assert client(pull) == len(FILES) + 1 and hub.seen("/resolve/", "GET")
    hub.requests.clear()
    assert client(pull) == len(FILES) + 1 and not hub.requests


def test_a_tree_comes_in_pages(client: Client, hub: HfServer) -> None:
    filled(hub)
    hub.page = 3
    found = client("""
result = [[type(e).__name__, e.path] for e in api.list_repo_tree(repo, recursive=True)]
""")
    assert {p for kind, p in found if kind == "RepoFile"} == {*FILES, ".gitattributes"}
    assert [p for kind, p in found if kind == "RepoFolder"] == ["sub"]
    assert [r.query.get("cursor") for r in hub.seen("/tree/")] == [None, "3", "6"]


def test_who_may_do_what(client: Client, hub: HfServer) -> None:
    filled(hub, private=True)
    reads = "error(api.model_info, repo), error(api.hf_hub_download, repo, 'README.md')"
    ask = f"result = [{reads}, error(commit, add('x', b'x'))]"
    absent = "RepositoryNotFoundError"
    assert client(ask, token="") == [[absent, 401]] * 3
    assert client(ask, token="hf_other") == [[absent, 404]] * 3
    assert client(ask, token="hf_read") == [None, None, ["HfHubHTTPError", 403]]
    client.forget()
    assert client(ask, token="hf_wrong") == [["HfHubHTTPError", 401]] * 3
    change = "api.update_repo_settings(repo, private=False, gated='auto'); result = 1"
    assert client(change) == 1
    client.forget()
    gated = f"result = [{reads}]"
    assert client(gated, token="hf_other") == [None, ["GatedRepoError", 403]]
    assert client(gated, token="") == [None, ["GatedRepoError", 401]]


PUSH = "api.create_repo(repo); result = api.upload_folder(repo_id=repo, folder_path=folder).oid"


@pytest.mark.parametrize("verify", [False, True])
def test_large_files_come_in_parts(client: Client, hub: HfServer, verify: bool) -> None:
    hub.multipart, hub.verify = 1_200_000, verify
    commit = client(PUSH)
    assert [r.received for r in hub.seen("/uploads/", "PUT")] == [1_200_000] * 2 + [600_000]
    assert len(hub.seen("/uploads/", "POST")) == 1
    assert len(hub.seen("/lfs/verify")) == verify
    files = client("result = read(api.snapshot_download(repo))")
    assert files[WEIGHTS] == HEX[WEIGHTS] and len(commit) == 40
