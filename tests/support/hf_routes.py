"""The addresses of the test Hub, and what they answer."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from fnmatch import fnmatch
from math import ceil
from typing import Any
from urllib.parse import parse_qsl, quote

from hf_store import ATTRIBUTES, File, Refused
from hf_wire import Answer, Call, document, route

API = r"/api/models/(?P<repo>[^/]+/[^/]+)"
LFS = r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs"
BIG = 10 << 20  # larger files are LFS, whatever they are called
PATTERNS = [line.split()[0] for line in ATTRIBUTES.splitlines()]


def entry(path: str, file: File) -> dict[str, Any]:
    """A file in a tree."""
    shown = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        shown["lfs"] = {"oid": file.lfs, "size": file.size, "pointerSize": file.pointer}
    return shown


def folders(files: dict[str, File], above: str) -> dict[str, dict[str, Any]]:
    """The folders in a tree that hold these files."""
    found = {}
    for path in files:
        for end, letter in enumerate(path):
            if letter == "/" and end >= len(above):
                name = path[:end]
                below = sorted(f.oid for p, f in files.items() if p.startswith(f"{name}/"))
                oid = hashlib.sha1("".join(below).encode()).hexdigest()
                found[name] = {"type": "directory", "oid": oid, "size": 0, "path": name}
    return found


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    name, role = call.user.name, call.user.role
    orgs = [{"type": "org", "name": name} for name in call.user.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return document({"type": "user", "id": name, "name": name, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create(call: Call) -> Answer:
    wanted = call.body.json()
    owner = wanted.get("organization") or (call.user.name if call.user else "")
    call.allow(owner)
    if wanted.get("type", "model") != "model":
        raise Refused(400, "Only models are here")
    name = f"{owner}/{wanted['name']}"
    private = wanted.get("private") or wanted.get("visibility") == "private"
    with call.hub.store.lock:
        answer = {"url": f"{call.hub.url}/{name}", "name": name}
        if call.hub.store.repository(name).exists:
            error = {"error": "You already created this model repo"}
            return document(error | answer, 409, **{"X-Error-Message": error["error"]})
        call.hub.store.create(name, bool(private))
    return document(answer)


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> Answer:
    wanted = call.body.json()
    owner = wanted.get("organization") or (call.user.name if call.user else "")
    call.names["repo"] = f"{owner}/{wanted['name']}"
    with call.hub.store.lock:
        call.hub.store.delete(call.repository(write=True))
    return document({})


@route("PUT", API + "/settings")
def settings(call: Call) -> Answer:
    wanted = call.body.json()
    if "visibility" in wanted:  # as 2.x says it
        wanted["private"] = wanted["visibility"] == "private"
    with call.hub.store.lock:
        changes = {key: wanted[key] for key in ("private", "gated") if key in wanted}
        call.repository(write=True).save(**changes)
    return document(wanted)


@route("GET", "/api/agent-harnesses")
def harnesses(call: Call) -> Answer:
    return document({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate(call: Call) -> Answer:
    call.body.json()["content"]
    return document({"errors": [], "warnings": []})


@route("GET", API + r"(/revision/(?P<rev>[^/]+))?")
def info(call: Call) -> Answer:
    repo = call.repository()
    sha, state = repo.revision(call.names["rev"] or "main"), repo.state
    siblings: list[dict[str, Any]] = []
    for path, file in repo.files(sha).items():
        siblings.append({"rfilename": path})
        if "blobs" in call.request.query:
            siblings[-1] |= {"size": file.size, "blobId": file.oid}
            if file.lfs:
                lfs = {"sha256": file.lfs, "size": file.size, "pointerSize": file.pointer}
                siblings[-1]["lfs"] = lfs
    names = {"_id": sha[:24], "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0]}
    times = {"createdAt": state["created"], "lastModified": repo.commit(sha)["date"]}
    rest = {"disabled": False, "downloads": 0, "likes": 0, "tags": []}
    shown = {"private": state["private"], "gated": state["gated"]}
    return document(names | times | rest | shown | {"sha": sha, "siblings": siblings})


@route("GET", API + "/refs")
def refs(call: Call) -> Answer:
    state = call.repository().state
    lists = {
        kind: [
            {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid}
            for name, oid in sorted(state[kind].items())
        ]
        for kind, folder in (("branches", "heads"), ("tags", "tags"))
    }
    return document(lists | {"converts": [], "pullRequests": []})


@route("GET", API + r"/commits/(?P<rev>[^/]+)")
def commits(call: Call) -> Answer:
    repo = call.repository()
    found = [
        {key: record[key] for key in ("id", "title", "message", "date")}
        | {"authors": [{"user": record["author"]}]}
        for record in repo.history(repo.revision(call.names["rev"]))
    ]
    return call.paged(found)


@route("GET", API + r"/tree/(?P<rev>[^/]+)(/(?P<path>.*))?")
def tree(call: Call) -> Answer:
    repo = call.repository()
    above = f"{call.names['path'].rstrip('/')}/".lstrip("/")
    files = repo.files(repo.revision(call.names["rev"]))
    below = {path: file for path, file in files.items() if path.startswith(above)}
    if above and not below:
        raise Refused(404, f"{above[:-1]} does not exist on this revision", "EntryNotFound")
    found = {path: entry(path, file) for path, file in below.items()} | folders(below, above)
    if call.request.query.get("recursive", "").lower() not in ("true", "1"):
        found = {path: one for path, one in found.items() if "/" not in path[len(above) :]}
    return call.paged([found[path] for path in sorted(found)])


@route("POST", API + r"/paths-info/(?P<rev>[^/]+)")
def paths(call: Call) -> Answer:
    repo = call.repository()
    files = repo.files(repo.revision(call.names["rev"]))
    if "json" in call.request.headers.get("content-type", ""):
        wanted = call.body.json()["paths"]
    else:
        form = parse_qsl(call.body.bytes().decode(), keep_blank_values=True)
        wanted = [value for key, value in form if key == "paths"]
    found = {path: entry(path, file) for path, file in files.items()} | folders(files, "")
    return document([found[path] for path in wanted if path in found])


@route("POST", API + r"/preupload/(?P<rev>[^/]+)")
def preupload(call: Call) -> Answer:
    """Answer how each file must be uploaded, and what its path holds now."""
    repo = call.repository(write=True)
    there = repo.files(repo.revision(call.names["rev"]))
    wanted = call.body.json()
    ignored = [line for line in wanted.get("gitIgnore", "").splitlines() if line]
    found = []
    for file in wanted["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        name = path.split("/")[-1]
        large = file["size"] > BIG or b"\0" in sample or any(fnmatch(name, p) for p in PATTERNS)
        skip = any(fnmatch(path, line) or fnmatch(name, line) for line in ignored)
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": skip}
        found.append(answer | ({"oid": there[path].etag} if path in there else {}))
    return document({"files": found})


@route("POST", LFS + "/objects/batch")
def batch(call: Call) -> Answer:
    """Answer where to upload the objects that are missing."""
    repo = call.repository(write=True)
    hub, wanted, found = call.hub, call.body.json(), []
    if wanted["operation"] != "upload" or wanted.get("hash_algo", "sha256") != "sha256":
        raise Refused(400, "Only uploads by sha256 are here")
    for one in wanted["objects"]:
        oid, size = one["oid"], one["size"]
        if not re.fullmatch("[0-9a-f]{64}", oid) or not isinstance(size, int) or size < 0:
            raise Refused(400, f"Not an object: {one}")
        found.append({"oid": oid, "size": size})
        if repo.lfs(oid).is_file():
            continue
        chunk = hub.multipart if 0 < hub.multipart < size else None
        key = hub.store.begin(repo.id, oid, size, chunk)
        upload: dict[str, Any] = {"href": f"{hub.url}/uploads/{key}"}
        if chunk:
            parts = range(1, ceil(size / chunk) + 1)
            header = {f"{part:05}": f"{upload['href']}/{part}" for part in parts}
            upload["header"] = {"chunk_size": str(chunk)} | header
        found[-1] |= {"authenticated": True, "actions": {"upload": upload}}
        if hub.verify:
            verify = {"href": f"{hub.url}/{repo.id}.git/info/lfs/verify"}
            found[-1]["actions"]["verify"] = verify
    transfer = "multipart" if any("header" in str(one) for one in found) else "basic"
    return document({"transfer": transfer, "objects": found})


@route("POST", LFS + "/verify")
def verify(call: Call) -> Answer:
    wanted, repo = call.body.json(), call.repository(write=True)
    blob = repo.lfs(wanted["oid"])
    if not re.fullmatch("[0-9a-f]{64}", wanted["oid"]) or not blob.is_file():
        raise Refused(404, "Object not found")
    if blob.stat().st_size != wanted["size"]:
        raise Refused(422, "The object has another size")
    return document({})


@route("PUT", r"/uploads/(?P<key>[0-9a-f]{32})(/(?P<part>\d{1,5}))?")
def put(call: Call) -> Answer:
    key, part, pieces = call.names["key"], call.names["part"], call.body.pieces()
    store = call.hub.store
    etag = store.put_part(key, int(part), pieces) if part else store.put(key, pieces)
    return Answer(headers={"ETag": f'"{etag}"'})


@route("POST", r"/uploads/(?P<key>[0-9a-f]{32})")
def complete(call: Call) -> Answer:
    call.hub.store.complete(call.names["key"], call.body.json()["parts"])
    return document({})


@route("POST", API + r"/commit/(?P<rev>[^/]+)")
def commit(call: Call) -> Answer:
    if "create_pr" in call.request.query:
        raise Refused(400, "Pull requests are not here")
    repo = call.repository(write=True)
    lines = [json.loads(line) for line in call.body.bytes().splitlines() if line.strip()]
    if not lines or lines[0]["key"] != "header" or not lines[0]["value"]["summary"]:
        raise Refused(400, "The first line of a commit is its header, with a summary")
    assert call.user is not None
    with call.hub.store.lock:
        oid = repo.append(call.names["rev"], call.user.name, lines[0]["value"], lines[1:])
    url = f"{call.hub.url}/{repo.id}/commit/{oid}"
    return document({"commitOid": oid, "commitUrl": url, "pullRequestUrl": None})


@route("POST", API + r"/(?P<kind>tag|branch)/(?P<rev>[^/]+)")
def add_ref(call: Call) -> Answer:
    """A tag of the revision in the path, or the branch in the path from another revision."""
    with call.hub.store.lock:
        repo, wanted, rev = call.repository(write=True), call.body.json(), call.names["rev"]
        tag = call.names["kind"] == "tag"
        name, kind = (wanted["tag"], "tags") if tag else (rev, "branches")
        oid = repo.revision(rev if tag else wanted.get("startingPoint", "main"))
        refs = repo.state[kind]
        if not re.fullmatch(r"\w[\w./+-]*", name) or ".." in name:
            raise Refused(400, f"Invalid name: {name!r}")
        if name in refs:
            raise Refused(409, f"Reference already exists: {name}")
        repo.save(**{kind: refs | {name: oid}})
    return document({})


@route("DELETE", API + r"/(?P<kind>tag|branch)/(?P<rev>[^/]+)")
def remove_ref(call: Call) -> Answer:
    with call.hub.store.lock:
        repo, name = call.repository(write=True), call.names["rev"]
        kind = "tags" if call.names["kind"] == "tag" else "branches"
        refs = repo.state[kind]
        if name not in refs:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        if (kind, name) == ("branches", "main"):
            raise Refused(403, "The default branch cannot be deleted")
        repo.save(**{kind: {n: oid for n, oid in refs.items() if n != name}})
    return document({})


@route("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
def resolve(call: Call) -> Answer:
    """A file; what the names of its headers are is what clients go by."""
    repo = call.repository()
    if repo.state["gated"] and not (call.user and call.user.owns(repo.id.split("/")[0])):
        status = 403 if call.user else 401
        raise Refused(status, f"Access to model {repo.id} is restricted", "GatedRepo")
    sha, path = repo.revision(call.names["rev"]), call.names["path"]
    file = repo.files(sha).get(path)
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"'}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.lfs}"', "X-Linked-Size": str(file.size)}
    headers["Content-Type"] = "application/octet-stream" if file.lfs else "text/plain"
    name = quote(path.split("/")[-1])
    headers["Content-Disposition"] = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
    elsewhere = f"/cdn/{repo.id}/{'lfs' if file.lfs else 'git'}/{file.etag}"
    return Answer(repo.content(file), 200, headers, ranged=True, elsewhere=elsewhere)


@route("GET", r"/cdn/(?P<repo>[^/]+/[^/]+)/(?P<kind>lfs|git)/(?P<oid>[0-9a-f]+)")
def cdn(call: Call) -> Answer:
    """Answer a redirected request with the bytes, for everybody who has the address."""
    oid = call.names["oid"]
    blob = call.hub.store.repository(call.names["repo"]).folder / call.names["kind"] / oid
    if not blob.is_file():
        raise Refused(404, "Not found")
    return Answer(blob, 200, {"ETag": f'"{oid}"'}, ranged=True)
