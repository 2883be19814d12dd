"""Nothing gets in: the policies of the hub against hostile repositories, folders and files.

Policy by policy, what this module has and what is tested elsewhere:

1. names that are fetched: here; a repository of a pickle alone: test_push.
2. no loader sees a pickle: here; folders with pickles: test_bad_input (only_a_pickle, renamed_...).
3. no code of a repository runs: here; other switches of a configuration: test_bad_input, test_formats.
4. names and digests that a server states: here; names of tasks: test_bad_input; in Reference and
   HfSource: test_readers.
5. sizes: here; headers: test_formats (HOSTILE), test_bad_input (deep_header); disk: test_store.
6. digests: here for pulls; partial files: test_remotes; objects: test_store, test_hygiene.
7. NaN and infinity: here for pulls and merges; folders: test_bad_input; every dtype: test_formats.
8. tokens: here; passwords of an index: test_remotes; pushes: test_push.
9. YAML: here for registries, locks and cards; recipes: test_bad_input (yaml_...).

What no check can see, weights that were trained to misbehave, docs/registry.md says.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, make_expert, run_hub, snapshot
from experthub.hub.errors import IntegrityError
from experthub.hub.files import patterns
from experthub.hub.proofs import proof
from experthub.hub.store.store import Store
from experthub.hub.transfer.remotes import _download, _http, _limits
from hf_server import HfServer
from hf_store import write
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.attack, pytest.mark.usefixtures("hurried")]
Make = Callable[..., Path]
Rows = list[dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
CONFIG, WEIGHTS, GATES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "phatgoose_gates.safetensors",
)
CHILD = "hub/conversion/file_formats/pickle_child.py"  # It reads pickles, in a sandbox.
SECRET = "hf_Secret0123456789"
TREE, REVISION = "/tree/", "/revision/main$"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN_PATH", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_http, "WAIT", 0.001)
    monkeypatch.setattr(_http, "TRIES", 2)
    with HfServer(tmp_path / "server") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        yield made


@pytest.fixture
def files(expert_folder: Make) -> dict[str, bytes]:
    """A sound expert."""
    return {path.name: path.read_bytes() for path in expert_folder(1).iterdir()}


@pytest.fixture
def published(server: HfServer, files: dict[str, bytes]) -> HfServer:
    """A hub that has the sound expert, as alice/x."""
    publish(server, files)
    return server


def publish(server: HfServer, files: dict[str, bytes], name: str = "alice/x") -> None:
    repo = server.store.create(name, private=False)
    changes: Rows = []
    for path, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        encoded = b64encode(content).decode()
        value = {"path": path, "content": encoded, "encoding": "base64"}
        large = path.endswith((".safetensors", ".bin", ".pt"))
        if large:
            write(repo.lfs(sha256), content)
            value = {"path": path, "oid": sha256}
        changes.append({"key": "lfsFile" if large else "file", "value": value})
    repo.append("main", "alice", {"summary": "all of it"}, changes)


def refused(home: Path, *words: str | Path, code: int = 3, error: str = "") -> Ran:
    """Run a command that must be refused in one line, and leave nothing but downloads."""
    root, kept = home.parent, ("home/hf/", "home/partial", "home/fingerprints", "server")
    before = snapshot(root, *kept)
    ran = run_hub(*words)
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert "Traceback" not in ran.err
    assert len(ran.lines("error: ")) == len(ran.lines("hint: ")) == 1, ran.err
    assert re.search(error, ran.lines("error: ")[0]), ran.err
    assert len(ran.lines("error: ")[0]) < 1000
    assert snapshot(root, *kept) == before
    return ran


def pull_refused(home: Path, error: str, code: int = 3, *more: str) -> Ran:
    ran = refused(home, "pull", "hf:alice/x", *more, code=code, error=error)
    assert str(home / "hf") not in ran.err  # it says where the files came from
    assert not (home / "objects").exists() and not (home / "registry").exists()
    return ran


def asked(server: HfServer) -> set[str]:
    """The names of the files that somebody asked for."""
    return {request.path.rpartition("/")[2] for request in server.seen("/resolve/")}


# 1. What is fetched at all


def test_other_files_are_left_out_and_named(
    server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    others = ("adapter_model.bin", "handler.py", "optimizer.pt", "run.sh", "tokenization.py")
    usual = ("README.md", "LICENSE", ".gitignore")
    # A tokenizer is fetched, because it may have tokens of the adapter's own; this one has none.
    tokenizer = {"tokenizer.json"}
    extra = dict.fromkeys((*others, *usual, *tokenizer, "deep/adapter_config.json"), b"import os")
    publish(server, files | extra)
    ran = run_hub("pull", "hf:alice/x")
    assert ran.code == 0, ran.err
    (note,) = ran.lines("note: hf:alice/x: omitted ")
    for name in (*others, "deep"):
        assert name in note
    assert not [name for name in (*usual, *tokenizer) if name in note]
    assert asked(server) == {*files, *tokenizer}
    fetched = {p.name for p in (home / "hf").rglob("*.*") if p.is_file()}
    assert fetched == {*files, *tokenizer, "files.yaml"}
    assert b"import os" not in [path.read_bytes() for path in Store().list_objects().values()]


@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "pkl", "ckpt", "gguf", "py"])
def test_a_repository_without_safetensors(
    ending: str, server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    publish(server, {CONFIG: files[CONFIG], f"adapter_model.{ending}": pickle.dumps({})})
    picked = ending in ("bin", "pt", "pth", "pkl", "ckpt")
    pull_refused(home, "pickles are never read" if picked else "has no safetensors")
    assert not asked(server)


def test_names_do_not_reach_the_terminal_as_they_are(published: HfServer, home: Path) -> None:
    names = ["\x1b[2J\x1b[31mfine.py", "a\nerror: b", "\u202egnp.py", "\ud800"]
    rows = [{"type": "file", "oid": "0" * 40, "size": 1, "path": name} for name in names]
    published.fault(TREE, json=lambda tree: tree + rows)
    ran = run_hub("pull", "hf:alice/x")
    assert ran.code == 0 and "\\x1b[2J" in ran.err and "\\nerror" in ran.err
    assert all(c.isprintable() or c == "\n" for c in ran.err) and not ran.lines("error")


def test_descriptions_do_not_either(
    server: HfServer, home: Path, files: dict[str, bytes], expert_folder: Make
) -> None:
    from experthub.hub.store.folder import read_folder

    identity = read_folder(expert_folder(1)).record()
    described = {"name": "x", "base": "b\x1b[2J", "description": "\x1b]0;owned\x07 text\nmore"}
    content = json.dumps(described | {"identity": identity, "tags": ["\x9b31m"]}).encode()
    publish(server, files | {"expert.json": content})
    assert run_hub("pull", "hf:alice/x").code == 0
    for words in (("show", "x"), ("list",), ("search", "x")):
        ran = run_hub(*words)
        assert ran.code == 0 and all(c.isprintable() or c == "\n" for c in ran.out + ran.err)


# 2. Pickles are never read


def test_a_pickle_does_not_stand_in_for_damaged_weights(
    server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    publish(server, files | {WEIGHTS: files[WEIGHTS][:-8], "adapter_model.bin": pickle.dumps(1)})
    pull_refused(home, "is damaged")
    assert "adapter_model.bin" not in asked(server)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_under_another_name(
    protocol: int, server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    publish(server, files | {WEIGHTS: pickle.dumps({"a": [1] * 99}, protocol=protocol)})
    pull_refused(home, "is a pickle|is damaged")


def test_an_adapter_beside_a_base_is_not_loaded_with_it(
    server: HfServer, home: Path, files: dict[str, bytes], base_folder: Path, tmp_path: Path
) -> None:
    """transformers would add it to the model: from a .bin, if there is nothing else."""
    base = {path.name: path.read_bytes() for path in base_folder.iterdir()}
    publish(server, base | files | {"adapter_model.bin": pickle.dumps(1)})
    Path("registry.yaml").write_text("version: 1\nbases: {b: {sources: ['hf:alice/x']}}\n")
    ran = run_hub("pull", "b")
    assert ran.code == 0, ran.err
    assert not asked(server) & {*files, "adapter_model.bin"} and WEIGHTS in ran.err
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, content in (base | {CONFIG: files[CONFIG]}).items():
        (mine / name).write_bytes(content)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {mine}\nexperts: [{tmp_path}/expert-1]\nmerge: {{method: linear}}\n")
    refused_compose(home, recipe, f"holds a model and {CONFIG}")


def refused_compose(home: Path, recipe: Path, error: str, code: int = 3) -> None:
    """Call `refused` with a composition whose expert is in the store already."""
    run_hub("add", next(home.parent.glob("expert-1")), "--name", "there")
    refused(home, "compose", recipe, "--out", home.parent / "out", code=code, error=error)
    assert not (home.parent / "out").exists()


def test_the_source_calls_nothing_that_reads_pickles_or_runs_code() -> None:
    torch_loads, peft_loads = [], []
    packages = ("hub", "cli", "merge", "routing")
    for path in (p for package in packages for p in (ROOT / package).rglob("*.py")):
        place = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                words = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("pickle.load", "pickle.loads", "eval", "exec"), path
                assert "Unpickler" not in called, path
                if called == "torch.load":
                    torch_loads.append(place)
                    assert words.get("weights_only") == "True", path
                if "PeftModel" in called:
                    peft_loads.append(place)
                    assert words.get("local_files_only") == "True", path
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [str(node.module), *(f"{node.module}.{a.name}" for a in node.names)]
            assert not [name for name in imported if name.endswith("pickle_child")], path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", path
    # The first runs in a process of its own; the second is called only where there is no pickle.
    assert torch_loads == [CHILD] and peft_loads == ["hub/proofs/proof.py"]


def test_the_module_that_reads_pickles_is_no_part_of_the_hubs_process() -> None:
    """Importing all modules of the hub does not import it either."""
    modules = [
        ".".join(("experthub", *path.relative_to(ROOT).with_suffix("").parts))
        for package in ("hub", "cli")
        for path in (ROOT / package).rglob("*.py")
        if str(path.relative_to(ROOT)) != CHILD
    ]
    script = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
        "assert not [name for name in sys.modules if 'pickle_child' in name]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *modules], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class Bomb:
    """An object whose pickle makes a folder where it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("mark",)


def test_a_proof_reads_no_pickle(home: Path, expert_folder: Make) -> None:
    """peft gets a copy of the checked files, which has no pickle."""
    folder = expert_folder(1)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    given: list[Path] = []
    load = proof.load_with_peft

    def watched(copy: Path) -> proof.SourceLibrary:
        given.append(copy)
        assert {path.name for path in copy.iterdir()} == {CONFIG, WEIGHTS, GATES}
        return load(copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "load_with_peft", watched)
        ran = run_hub("add", folder, "--name", "x", "--proof")
    assert ran.code == 0 and "equal to peft" in ran.err, ran.err
    assert len(given) == 1 and home in given[0].parents and not given[0].exists()
    assert not Path("mark").exists()


# 3. Configurations that name code

CODE: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoModel": "evil.Model"}},
    "auto_mapping": {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}},
    "dynamic module": {"auto_mapping": {"parent_library": "transformers_modules.evil"}},
    "odd auto_mapping": {"auto_mapping": "evil"},
    "megatron_core": {"megatron_core": "evil.core"},
    "megatron_config": {"megatron_config": {"a": 1}},
    "kernel": {"_attn_implementation_internal": "evil/kernel"},
    "experts kernel": {"_experts_implementation_internal": "evil/kernel"},
}


@pytest.mark.parametrize("name", CODE)
def test_an_adapter_that_names_code(
    name: str, server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    config = json.loads(files[CONFIG]) | CODE[name]
    publish(server, files | {CONFIG: json.dumps(config).encode()})
    pull_refused(home, next(iter(CODE[name])))


def test_what_peft_itself_writes_is_no_code(
    server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    library = {"base_model_class": "BertModel", "parent_library": "transformers.models.bert.x"}
    config = json.loads(files[CONFIG]) | {"auto_mapping": library, "megatron_core": "megatron.core"}
    publish(server, files | {CONFIG: json.dumps(config).encode()})
    assert run_hub("pull", "hf:alice/x").code == 0


BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "code": ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}}),
    "foreign code": ("config.json", {"auto_map": {"AutoModelForCausalLM": "a/b--evil.Model"}}),
    "code below": ("config.json", {"text_config": [{"auto_map": {"AutoModel": "evil.Model"}}]}),
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}),
    "generation": ("generation_config.json", {"auto_map": {"x": "evil.Model"}}),
    "kernel": ("config.json", {"_attn_implementation_internal": "evil/kernel"}),
    "public kernel": ("config.json", {"attn_implementation": "evil/kernel"}),
    "kernels": ("config.json", {"attn_implementation": {"text_config": "evil/kernel@main"}}),
    "other weights": ("config.json", {"transformers_weights": "other.safetensors"}),
    "classes": ("config.json", {"architectures": {"a": "b"}}),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_names_code(
    name: str, server: HfServer, home: Path, base_folder: Path, files: dict[str, bytes]
) -> None:
    file, changes = BASES[name]
    marker = home.parent / "it-ran"
    base = {path.name: path.read_bytes() for path in base_folder.iterdir()}
    base[file] = json.dumps(json.loads(base.get(file, b"{}")) | changes).encode()
    base["evil.py"] = f"open({str(marker)!r}, 'w')".encode()
    publish(server, base, "alice/base")
    error = f"{file}: {next(iter(changes)) if name != 'code below' else 'auto_map'} is "
    recipe = home.parent / "recipe.yaml"
    recipe.write_text(
        f"base: hf:alice/base\nexperts: [{home.parent}/expert-1]\nmerge: {{method: linear}}\n"
    )
    refused_compose(home, recipe, error)
    Path("registry.yaml").write_text("version: 1\nbases: {b: {sources: ['hf:alice/base']}}\n")
    refused(home, "pull", "b", error=error)
    assert not marker.exists() and "evil.py" not in asked(server)


@pytest.mark.parametrize("kind", ["logging", "pipeline", "AutoModel", "Nothing", "__name__", ""])
def test_a_class_that_is_no_model(
    kind: str, home: Path, base_folder: Path, expert_folder: Make, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in base_folder.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"architectures": [kind]}
    (base / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nexperts: [{expert_folder(1)}]\nmerge: {{method: linear}}\n")
    refused_compose(home, recipe, "transformers has no class", code=1)


# 4. Names and digests that a server states

NAMES = [
    *("../x", "../../adapter_model.safetensors", "/etc/passwd", "/tmp/adapter_config.json"),
    *("a\\..\\adapter_config.json", "c:adapter_config.json", "adapter_config.json\0", "a\x1fb"),
    *("", ".", "..", "./adapter_config.json", "adapter_config.json/", "x" * 300 + ".json"),
    *("a/" * 20 + "adapter_config.json", "ADAPTER_CONFIG.JSON", "adapter_config.json\n"),
    *("~/adapter_config.json", "%2e%2e%2fadapter_config.json", "adapter\u2024config.json", "-x"),
]


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "instead"])
def test_names_that_are_no_plain_file(beside: bool, published: HfServer, home: Path) -> None:
    """Beside the real files they are left out; instead of them, nothing is there to be had."""

    def changed(tree: Rows) -> Rows:
        row = next(row for row in tree if row["path"] == WEIGHTS)
        kept = tree if beside else [row for row in tree if row["path"] not in (WEIGHTS, GATES)]
        return [row | {"path": name} for name in NAMES] + kept

    published.fault(TREE, json=changed)
    before = snapshot(home.parent, "home", "server")
    if beside:
        ran = run_hub("pull", "hf:alice/x")
        assert ran.code == 0 and "omitted" in ran.err, ran.err
    else:
        pull_refused(home, "has no safetensors")
    assert asked(published) <= {CONFIG, WEIGHTS, GATES}
    assert snapshot(home.parent, "home", "server") == before


@pytest.mark.parametrize("kind", ["directory", "symlink", "commit", None, 7, ["file"]])
def test_weights_that_are_no_file(kind: Any, published: HfServer, home: Path) -> None:
    published.fault(TREE, json=lambda tree: [row | {"type": kind} for row in tree])
    pull_refused(home, "has no safetensors")


def test_a_name_that_stands_twice(
    server: HfServer, home: Path, files: dict[str, bytes], base_folder: Path
) -> None:
    publish(server, files)
    server.fault(TREE, json=lambda tree: tree + [r for r in tree if r["path"] == CONFIG])
    pull_refused(home, f"two files '{CONFIG}'")
    base = {path.name: path.read_bytes() for path in base_folder.iterdir()}
    server.faults.all.clear()
    publish(server, base | {"CONFIG.json": b"{}"}, "alice/base")
    Path("registry.yaml").write_text("version: 1\nbases: {b: {sources: ['hf:alice/base']}}\n")
    refused(home, "pull", "b", error="two files 'config.json'")


COMMITS: list[Any] = ["../../x", "0" * 39, "0" * 41, "A" * 40, "0" * 40 + "\n", "", None, 1, ["0"]]


@pytest.mark.parametrize("sha", COMMITS, ids=repr)
def test_a_commit_that_is_none(sha: Any, published: HfServer, home: Path) -> None:
    published.fault(REVISION, json=lambda info: info | {"sha": sha})
    pull_refused(home, "has no commit", 1)
    assert not (home / "hf").exists()


ANSWERS: dict[str, bytes] = {
    "list": b"[]",
    "text": b'"x"',
    "null": b"null",
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "no JSON": b"<html>",
    "no text": b"\xff\xfe\x00",
    "long number": b'{"sha":' + b"9" * 10_000 + b"}",
    "nothing": b"",
}


@pytest.mark.parametrize("path", [REVISION, TREE])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_are_none(name: str, path: str, published: HfServer, home: Path) -> None:
    published.fault(path, change=lambda _: ANSWERS[name])
    empty = (name, path) == ("list", TREE)
    pull_refused(home, "hf:alice/x", 3 if empty else 1)


ROWS: dict[str, dict[str, Any]] = {
    "digest of a path": {"lfs": {"oid": "../../../x", "size": 10}},
    "short digest": {"lfs": {"oid": "0" * 63, "size": 10}},
    "digest with a line end": {"lfs": {"oid": "0" * 64 + "\n", "size": 10}},
    "upper case": {"lfs": {"oid": "A" * 64, "size": 10}},
    "no digest": {"lfs": {"size": 10}},
    "list for a digest": {"lfs": {"oid": ["0" * 64], "size": 10}},
    "blob of a path": {"lfs": None, "oid": "../../../../x", "size": 10},
    "blob that is none": {"lfs": None, "oid": None, "size": 10},
    "negative size": {"lfs": {"oid": "0" * 64, "size": -1}},
    "size in words": {"lfs": {"oid": "0" * 64, "size": "10"}},
    "broken size": {"lfs": {"oid": "0" * 64, "size": 1.5}},
    "endless size": {"lfs": {"oid": "0" * 64, "size": 1 << 60}},
    "no size": {"lfs": {"oid": "0" * 64}},
    "small file that is large": {"lfs": None, "oid": "0" * 40, "size": 9 << 20},
}


@pytest.mark.parametrize("name", ROWS)
def test_sizes_and_digests_that_are_none(name: str, published: HfServer, home: Path) -> None:
    def changed(tree: Rows) -> Rows:
        return [row | ROWS[name] if row["path"] == WEIGHTS else row for row in tree]

    published.fault(TREE, json=changed)
    pull_refused(home, f"{WEIGHTS} has no valid size and digest")
    assert not asked(published) and not list((home / "partial").glob("*"))


def test_headers_name_no_file(published: HfServer, home: Path) -> None:
    wrong = {
        "ETag": '"../../../x"',
        "X-Linked-Etag": '"/x"',
        "X-Repo-Commit": "../../x",
        "Content-Disposition": 'attachment; filename="../../../x"',
    }
    published.fault("/resolve/", headers=wrong)
    before = snapshot(home.parent, "home", "server")
    assert run_hub("pull", "hf:alice/x").code == 0
    assert snapshot(home.parent, "home", "server") == before


@pytest.mark.parametrize("digest", ["../../../x", "", "0" * 63, "A" * 64, "0" * 64 + "/"])
def test_a_digest_becomes_a_name_only_if_it_is_one(digest: str, tmp_path: Path) -> None:
    """Digests come from an index of packages, and the server gets no request."""
    with pytest.raises(IntegrityError, match="has the invalid digest"):
        _download.download("http://127.0.0.1:9/x", digest, tmp_path / "a" / "b" / "c")
    assert not (tmp_path / "a").exists() and not (tmp_path / "x").exists()


SOURCES = [
    *("..", "../x", "a/..", ".", "./x", "/a", "a/b/c", "a--b/c", "a/b@..", "a/b@../x", "a/b@/x"),
    *("a/b@.", "a/b@", "", "a b/c", "a/b?x", "a/b#x", "\u00e4/b", "a/" + "b" * 300, "a\n/b"),
]


@pytest.mark.parametrize("source", SOURCES)
def test_sources_that_are_none(source: str, server: HfServer, home: Path) -> None:
    refused(home, "pull", f"hf:{source}", code=2, error="is not a source")
    assert not server.requests


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", "X", "a\nb", "x" * 97, "\x1b[2J"])
def test_an_expert_that_calls_itself_a_path(
    name: str, server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    publish(server, files | {"expert.json": json.dumps({"name": name}).encode()})
    pull_refused(home, "names the expert")


def described(folder: Path, **changes: Any) -> Path:
    """The folder, with an expert.json of which some fields are changed."""
    from experthub.hub.store.folder import read_folder

    record = {"name": "x", "base": "b", "identity": read_folder(folder).record()}
    (folder / "expert.json").write_text(json.dumps(record | changes))
    return folder


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "config.py", ""])
def test_an_identity_that_names_other_files(name: str, home: Path, expert_folder: Make) -> None:
    file = {"sha256": "0" * 64, "size": 1}
    identity = {"kind": "lora", "base_fingerprint": None, "files": {name: file}}
    folder = described(expert_folder(1), identity=identity)
    refused(home, "add", folder, "--name", "x", error="no valid identity")


TOO_MUCH: dict[str, dict[str, Any]] = {
    "long": {"description": "x" * (2 << 20)},
    "deep": {"training": json.loads('{"a":' * 200 + "1" + "}" * 200)},
    "deeper": {"training": json.loads('{"a":' * 600 + "1" + "}" * 600)},
    "many digits": {"training": {"a": 10**3000}},
    "version": {"version": 10**300},
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_description_that_no_registry_could_be_read_with(
    name: str, server: HfServer, home: Path, files: dict[str, bytes], expert_folder: Make
) -> None:
    """It is not written, so that the next command still works."""
    folder = described(expert_folder(1), **TOO_MUCH[name])
    refused(home, "add", folder, "--name", "x")
    publish(server, files | {"expert.json": (folder / "expert.json").read_bytes()})
    pull_refused(home, "description|version|inside of each other")
    assert run_hub("list").code == 0


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pipe_or_a_device_is_no_file(name: str, home: Path, expert_folder: Make) -> None:
    """Opening a pipe would wait for ever, and a device has no end."""
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        folder = expert_folder(1)
        (folder / name).unlink()
        make(folder / name)
        refused(home, "add", folder, "--name", "x", error="is not a file|has no adapter_config")


# 5. Sizes


def test_a_disk_without_room(published: HfServer, home: Path) -> None:
    size = {"lfs": {"oid": "0" * 64, "size": 1 << 40}}
    published.fault(TREE, json=lambda tree: [row | size | {"size": 1 << 40} for row in tree])
    pull_refused(home, "MiB are needed", 1)
    assert not asked(published)


@pytest.mark.parametrize("size", ["1", "1000", "1kb", "0.001MB", "1KiB"])
def test_more_than_the_user_allows(size: str, published: HfServer, home: Path) -> None:
    pull_refused(home, "at most .* are allowed", 3, "--max-size", size)
    assert not asked(published)


def test_as_much_as_the_user_allows(published: HfServer, files: dict[str, bytes]) -> None:
    size = sum(map(len, files.values()))
    assert run_hub("pull", "hf:alice/x", "--max-size", str(size - 1)).code == 3
    assert run_hub("pull", "hf:alice/x", "--max-size", str(size)).code == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500MB", 500_000_000), ("2 GiB", 2 << 30), ("1.5k", 1500), ("7b", 7)],
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert _limits.parse_size(text) == size


@pytest.mark.parametrize("size", ["x", "-1", "1XB", "1e9", "MB", "1 2", "inf", "9" * 30])
def test_sizes_that_are_none(size: str, published: HfServer, home: Path) -> None:
    pull_refused(home, "is not a size", 2, "--max-size", size)
    assert not published.requests


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("more", [1, 3_000_000])
def test_a_file_that_goes_on(name: str, more: int, published: HfServer, home: Path) -> None:
    fault = published.fault(f"/resolve/.*{name}", change=lambda body: body + b"x" * more)
    pull_refused(home, f"{name} has (the sha256|more than|\\d+ bytes, expected)")
    assert fault.hits == 1 and not list((home / "partial").glob("*"))


def test_an_answer_without_an_end(published: HfServer, home: Path) -> None:
    published.fault(TREE, change=lambda _: b"[" + b" " * (17 << 20) + b"]")
    pull_refused(home, "the answer is longer than")


def test_a_list_without_an_end(published: HfServer, home: Path) -> None:
    onward = {"Link": '</api/models/alice/x/tree/main>; rel="next"'}
    fault = published.fault(TREE, headers=onward, json=lambda _: [])
    pull_refused(home, "more than 10000 files", 1)
    assert fault.hits == 101


def test_a_list_of_too_many(published: HfServer, home: Path) -> None:
    published.fault(TREE, json=lambda tree: tree * 5000)
    pull_refused(home, "two files|more than 10000 files", 1)
    assert not asked(published)


@pytest.mark.parametrize("name", [CONFIG, "expert.json"])
@pytest.mark.parametrize("content", [b"[" * 300_000, b'{"a":' * 100_000, b"9" * 10_000, b"[]"])
def test_json_that_is_deep_or_none(
    name: str, content: bytes, server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    publish(server, files | {name: content})
    pull_refused(home, f"{name} is damaged")


def test_json_that_is_huge(home: Path, expert_folder: Make) -> None:
    folder = expert_folder(1)
    os.truncate(folder / CONFIG, 65 << 20)
    refused(home, "add", folder, "--name", "x", error="has more than")


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def many(count: int, shape: str = "[0]") -> bytes:
    row = f'{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}'
    return ("{" + ",".join(f'"t{i}":{row}' for i in range(count)) + "}").encode()


HEADERS = {
    "longer than 8 MiB": with_header(b"{}" + b" " * (8 << 20)),
    "more than 100,000 tensors": with_header(many(100_001)),
    "a long name": with_header(many(1).replace(b"t0", b"t" * 5000)),
    "a million sides": with_header(many(1, f"[{'4611686018427387903,' * 300_000}1]")),
    "a long dtype": with_header(many(1).replace(b"F32", b"F" * 100_000)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_beyond_measure(
    name: str, server: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    publish(server, files | {WEIGHTS: HEADERS[name]})
    pull_refused(home, "is damaged")


SLOW = {
    "target_modules": r"((model|[a-z0-9._]+)+)+X",
    "exclude_modules": r"(([a-z0-9._]+)+)+X",
    "rank_pattern": {r"(([a-z0-9._]+)+)+X": 4},
    "alpha_pattern": {r".*.*.*.*.*.*.*.*.*.*.*.*X": 4},
}
OTHER_TYPES: dict[str, dict[str, Any]] = {
    "LOHA": {"alpha": 8},
    "LOKR": {"alpha": 8},
    "LORA": {"lora_alpha": 8, "use_dora": True},
}
UNUSABLE = {
    "target_modules": "(" * 3000 + ")" * 3000,
    "exclude_modules": "x{99999999999999999999}",
    "rank_pattern": {"a)|(b": 4},
    "alpha_pattern": {"x" * 20_000: 4},
}


@pytest.mark.parametrize("key", SLOW)
def test_patterns_that_match_for_ever(
    key: str, home: Path, expert_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    folder = expert_folder(1, **{key: SLOW[key]})
    refused(home, "add", folder, "--name", "x", error="matching takes too long")


@pytest.mark.parametrize("key", UNUSABLE)
def test_patterns_that_are_none(key: str, home: Path, expert_folder: Make) -> None:
    folder = expert_folder(1, **{key: UNUSABLE[key]})
    refused(home, "add", folder, "--name", "x", error=f"{key} is ")


@pytest.mark.parametrize("kind", OTHER_TYPES)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["slow", "(" * 3000 + ")" * 3000, "a)|(b", "x" * 20_000])
def test_patterns_of_adapters_that_are_converted(
    pattern: str,
    key: str,
    kind: str,
    home: Path,
    expert_folder: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    folder = expert_folder(1, gates=False)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {
        "LOHA": {"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 4)}
        | {"hada_w2_b": (4, 32)},
        "LOKR": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 4), "lokr_w2_b": (4, 8)},
        "LORA": {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4)}
        | {"lora_magnitude_vector": (32,)},
    }[kind]
    random = {f"{module}.{n}": torch.randn(shape) for n, shape in shapes.items()}
    save_file(random, folder / WEIGHTS)
    config = {"peft_type": kind, "r": 4, "target_modules": ["q_proj"]} | OTHER_TYPES[kind]
    config["base_model_name_or_path"] = json.loads((folder / CONFIG).read_text())[
        "base_model_name_or_path"
    ]
    write_config = (folder / CONFIG).write_text
    write_config(json.dumps(config))
    sound = run_hub("add", folder, "--name", "sound", "--no-proof")
    assert sound.code == 0, sound.err
    if pattern == "slow":
        pattern = r".*.*.*.*.*.*.*.*.*.*.*.*X" if kind == "LORA" else r"(([a-z0-9._]+)+)+X"
    write_config(json.dumps(config | {key: {pattern: 4}}))
    ran = run_hub("add", folder, "--name", "x", "--no-proof")
    if kind == "LORA" and key == "rank_pattern" and ran.code == 0:
        return  # The rank of a DoRA is that of its factors.
    assert ran.code == 3 and "Traceback" not in ran.err, ran.err
    assert re.search(rf"{key} (is|in its)", ran.lines("error: ")[0]), ran.err


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 0), ("r", "4"), ("r", True), ("r", None), ("alpha", float("nan")), ("alpha", [8])],
)
def test_settings_of_adapters_that_are_converted(
    key: str, value: Any, home: Path, expert_folder: Make
) -> None:
    folder = expert_folder(1, gates=False)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 4)}
    factors |= {"hada_w2_b": (4, 32)}
    save_file({f"{module}.{n}": torch.ones(s) for n, s in factors.items()}, folder / WEIGHTS)
    config = {"peft_type": "LOHA", "r": 4, "alpha": 8, "target_modules": ["q_proj"]}
    named = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    config |= {"base_model_name_or_path": named, key: value}
    (folder / CONFIG).write_text(json.dumps(config))
    refused(home, "add", folder, "--name", "x", "--no-proof", error=f"{key} is ")


def test_a_pattern_that_breaks_another(home: Path, expert_folder: Make) -> None:
    folder = expert_folder(1, layers_to_transform=[0], layers_pattern="(?P<idx>x)?layers")
    refused(home, "add", folder, "--name", "x", error="redefinition of group name 'idx'")


@pytest.mark.parametrize(
    "targets", ["(([a-z0-9._]+)+)+X", "(" * 3000 + ")" * 3000, "x{9999999999}"]
)
def test_a_recipes_targets(
    targets: str,
    home: Path,
    base_folder: Path,
    expert_folder: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    recipe = tmp_path / "recipe.yaml"
    head = f"base: {base_folder}\nexperts: [{expert_folder(1)}]\nmerge: {{method: linear}}\n"
    recipe.write_text(f"{head}targets: '{targets}'\n")
    refused_compose(home, recipe, "targets", code=2)


# 6. Digests


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, GATES])
@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_byte_that_changed_on_its_way(
    name: str, at: int, published: HfServer, home: Path
) -> None:
    def flip(body: bytes) -> bytes:
        content = bytearray(body)
        content[at] ^= 1
        return bytes(content)

    fault = published.fault(f"/resolve/.*{name}", change=flip, times=1)
    pull_refused(home, f"{name} (has the sha256|differs from the file)")
    assert fault.hits == 1 and not list((home / "partial").glob("*"))
    assert run_hub("pull", "hf:alice/x").code == 0


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_too_short(name: str, published: HfServer, home: Path) -> None:
    published.fault(f"/resolve/.*{name}", change=lambda body: body[:-5])
    pull_refused(home, f"{name} has (the sha256|fewer than|\\d+ bytes, expected)")


def test_the_entry_of_a_registry_pins_the_content(
    published: HfServer, home: Path, files: dict[str, bytes]
) -> None:
    entry = {"name": "e", "base": "b", "digest": f"sha256:{'0' * 64}", "sources": ["hf:alice/x"]}
    Path("registry.yaml").write_text(json.dumps({"version": 1, "experts": [entry]}))
    refused(home, "pull", "e", error="cannot pull e@1: .*, expected sha256:0000")
    assert not (home / "objects").exists()


# 7. NaN and infinity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [WEIGHTS, GATES])
def test_weights_that_are_not_finite(
    name: str, value: float, server: HfServer, home: Path, expert_folder: Make
) -> None:
    folder = expert_folder(1)
    tensors = load_file(folder / name)
    tensors[min(tensors)].view(-1)[0] = value
    save_file(tensors, folder / name)
    publish(server, {path.name: path.read_bytes() for path in folder.iterdir()})
    pull_refused(home, "holds NaN or infinity")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merge_that_overflows(dtype: str, home: Path, base_folder: Path, tmp_path: Path) -> None:
    """Every weight is finite, and their product is not."""
    folder = make_expert(tmp_path / "expert-1", base_folder, 1, size=1e30)
    recipe = tmp_path / "recipe.yaml"
    head = f"base: {base_folder}\nexperts: [{folder}]\nmerge: {{method: linear}}\n"
    recipe.write_text(f"{head}dtype: {dtype}\n")
    refused_compose(home, recipe, f"overflows {dtype}")


# 8. Tokens


def secrets_in(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


TOLD: dict[str, dict[str, Any]] = {
    "unauthorised": {"status": 401},
    "forbidden": {"status": 403},
    "broken": {"status": 500},
    "elsewhere": {"headers": {"Location": f"http://u:{SECRET}@127.0.0.1:9/x?sig={SECRET}"}},
    "nowhere": {"headers": {"Location": f"http://[{SECRET}"}},
    "a file": {"headers": {"Location": f"file:///etc/passwd?{SECRET}"}},
    "lost": {"lose": True},
}


@pytest.mark.parametrize("path", [REVISION, TREE, f"/resolve/.*{CONFIG}", f"/resolve/.*{WEIGHTS}"])
@pytest.mark.parametrize("name", TOLD)
def test_errors_do_not_tell(
    name: str, path: str, published: HfServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.users[SECRET] = published.users["hf_read"]
    monkeypatch.setenv("HF_TOKEN", SECRET)
    how = TOLD[name]
    if "headers" in how:
        how = how | {"status": 302}
    published.fault(path, **how)
    ran = run_hub("pull", "hf:alice/x")
    assert ran.code in (1, 5) and len(ran.lines("error: ")) == 1 and "Traceback" not in ran.err
    assert SECRET not in ran.out + ran.err and not secrets_in(home)


@pytest.mark.parametrize("bad", ["\n", "\r\nX-Other: 1", " ", "\x7f", "\u00e4", "\u2028", "\ud800"])
@pytest.mark.parametrize("kept", ["variable", "file"])
def test_a_token_that_is_none_is_not_told(
    bad: str, kept: str, published: HfServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{SECRET}{bad}{SECRET}"
    if kept == "file":
        path = home.parent / "hf-home" / "token"
        path.parent.mkdir()
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        monkeypatch.setenv("HF_TOKEN", text.encode("utf-8", "replace").decode())
    if bad == "\ud800" and kept == "variable":
        monkeypatch.setitem(os.environ, "HF_TOKEN", f"{SECRET}\udcff")
    ran = pull_refused(home, "the token has", 5)
    assert SECRET not in ran.err and not published.requests


def test_a_token_goes_to_one_host_only(
    published: HfServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    with HfServer(published.store.root) as other:
        published.fault("/resolve/", redirect=other.url)
        assert run_hub("pull", "hf:alice/x").code == 0
        assert other.requests and not [r for r in other.requests if "authorization" in r.headers]
        assert all("authorization" in r.headers for r in published.requests)


def test_a_list_that_goes_on_elsewhere(
    published: HfServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    with HfServer(published.store.root) as other:
        onward = {"Link": f'<{other.url}/api/models/alice/x/tree/main>; rel="next"'}
        published.fault(TREE, headers=onward)
        pull_refused(home, "is on another host")
        assert not other.requests


@pytest.mark.parametrize("link", ["http://[", "//", "file:///x", "http://a:b:c/", "\xb2"])
def test_links_that_are_none(link: str, published: HfServer, home: Path) -> None:
    published.fault(TREE, headers={"Link": f'<{link}>; rel="next"'})
    ran = run_hub("pull", "hf:alice/x")
    assert ran.code in (1, 3, 4) and len(ran.lines("error: ")) == 1 and "Traceback" not in ran.err


@pytest.mark.parametrize("after", ["\xb2", "-1", "nan", "1e9", "soon", ""])
def test_waits_that_are_none(after: str, published: HfServer, home: Path) -> None:
    published.fault(f"/resolve/.*{WEIGHTS}", status=503, headers={"Retry-After": after}, times=1)
    assert run_hub("pull", "hf:alice/x").code == 0


def test_locks_do_not_hold_a_token(
    published: HfServer, home: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.users[SECRET] = published.users["hf_read"]
    monkeypatch.setenv("HF_TOKEN", SECRET)
    recipe = Path("recipe.yaml")
    recipe.write_text(f"base: {base_folder}\nexperts: [hf:alice/x]\nmerge: {{method: linear}}\n")
    ran = run_hub("lock", recipe)
    assert ran.code == 0, ran.err
    assert "hf:alice/x" in Path("recipe.lock.yaml").read_text()
    assert any(r.headers.get("authorization") == f"Bearer {SECRET}" for r in published.requests)
    assert SECRET not in ran.out + ran.err and not secrets_in(home.parent)


def test_a_token_that_others_can_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home.parent / "hf-home" / "token"
    path.parent.mkdir()
    path.write_text(SECRET)
    monkeypatch.setenv("HF_HOME", str(path.parent))
    for mode, status in ((0o644, "warning"), (0o600, "ok")):
        path.chmod(mode)
        ran = run_hub("doctor", "--json")
        (found,) = [c for c in ran.json["checks"] if c["name"] == "variables"]
        assert found["status"] == status and SECRET not in ran.out
        assert ("chmod 600" in found["next"]) is (mode == 0o644)


# 9. YAML

BOMBS: dict[str, tuple[str, str]] = {
    "laughs": (
        "a: &a [x, x]\n"
        + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
        "aliases are not supported",
    ),
    "itself": ("a: &a [*a]\n", "aliases are not supported"),
    "merged": ("a: &a {x: 1}\nb: {<<: *a}\n", "(aliases|merge keys) are not supported"),
    "object": ("a: !!python/object/apply:os.system ['x']\n", "the tag "),
    "function": ("a: !function x.y\n", "the tag !function"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested deeper than 100"),
    "long": ("# " + "x" * (1 << 20) + "\n", "is larger than"),
    "twice": ("a: 1\na: 2\n", "is set twice"),
    "many digits": ("a: " + "9" * 5000 + "\n", "a number of 5000 digits"),
    "hexadecimal": ("a: 0x" + "f" * 5000 + "\n", "a number of 5002 digits"),
    "control": ("a: \x00\n", "not YAML|special characters|control"),
}


@pytest.mark.parametrize("kind", ["recipe", "registry", "lock", "card"])
@pytest.mark.parametrize("name", BOMBS)
def test_yaml_of_others(
    name: str, kind: str, home: Path, base_folder: Path, tmp_path: Path
) -> None:
    text, error = BOMBS[name]
    head = f"base: {base_folder}\nexperts: [x]\nmerge: {{method: linear}}\n"
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "task"
    recipe.write_text(head)
    folder.mkdir()
    (folder / "examples.jsonl").write_text("")
    place, words = {
        "recipe": (recipe, ["compose", recipe]),
        "registry": (tmp_path / "r.yaml", ["list", "--registry", tmp_path / "r.yaml"]),
        "lock": (tmp_path / "recipe.lock.yaml", ["compose", "--frozen", recipe]),
        "card": (folder / "card.yaml", ["tasks", "import", folder]),
    }[kind]
    place.write_text(text)
    refused(home, *words, code=2, error=error)


ENTRY = f"name: e, base: b, sources: ['file:x'], digest: 'sha256:{'0' * 64}'"
REGISTRIES = {
    "name": "experts: [{name: ../../x, base: b, sources: [x], digest: x}]",
    "version": f"experts: [{{{ENTRY}, version: 0x{'f' * 99}}}]",
    "digest": "experts: [{name: e, base: b, sources: ['file:x'], digest: 'sha256:../../x'}]",
    "nothing": 'experts: [{name: e, base: b, sources: ["file:\\0"], digest: "sha256:'
    + "0" * 64
    + '"}]',
    "bases": "bases: {../../x: {sources: ['pypi:a==1#b']}}",
    "sha256": "bases: {x: {sources: ['pypi:a==1#b'], sha256: ../../x}}",
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_registries_of_others(name: str, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"version: 1\n{REGISTRIES[name]}\n")
    refused(home, "list", "--registry", file, code=2)


@pytest.mark.parametrize("field", ["name", "sha256", "fingerprint", "source", "nothing"])
def test_locks_of_others(
    field: str, home: Path, base_folder: Path, expert_folder: Make, tmp_path: Path
) -> None:
    entry = f"bases: {{b: {{sources: ['file:{base_folder}']}}}}"
    Path("registry.yaml").write_text(f"version: 1\n{entry}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: b\nexperts: [{expert_folder(1)}]\nmerge: {{method: linear}}\n")
    assert run_hub("lock", recipe).code == 0
    lock = tmp_path / "recipe.lock.yaml"
    changes = {
        "name": ("name: b\n", "name: ../../x\n"),
        "sha256": ("name: b\n", "name: b\n  sha256: ../../x\n"),
        "fingerprint": ("fingerprint: sha256:", "fingerprint: ../"),
        "source": ("file:", "evil:"),
        "nothing": (f"file:{base_folder}", '"file:\\0"'),
    }
    old, new = changes[field]
    text = lock.read_text()
    assert old in text
    lock.write_text(text.replace(old, new))
    refused(home, "compose", "--frozen", recipe, code=2)


def test_a_recipe_that_names_no_file(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text in ('base: "./a\\0"\nexperts: [x]', 'base: b\nexperts: ["./a\\0b"]'):
        recipe.write_text(f"{text}\nmerge: {{method: linear}}\n")
        refused(home, "compose", recipe, code=2, error=r"is not a reference|null")


def test_the_sound_expert_is_taken(published: HfServer, home: Path) -> None:
    """Every refusal above is of what was changed."""
    ran = run_hub("pull", "hf:alice/x", "--json")
    assert ran.code == 0, ran.err
    assert len(list((home / "objects").rglob("*"))) > 3
