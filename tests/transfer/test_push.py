"""Experts that travel through a model hub: pushed by one user, pulled by another, whole and the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_hub
from experthub import hub
from experthub.hub.files import yaml_files
from experthub.hub.registry.expert import Identity, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.hub.transfer.model_card import format_model_card
from experthub.hub.transfer.remotes import _http
from hf_server import HfServer

Make = Callable[..., Path]
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "expert.json",
    "phatgoose_gates.safetensors",
}
PUSH = "from experthub.cli.main import app; app()"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_http, "WAIT", 0.001)
    with HfServer(tmp_path / "server") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield made


def push(*words: str) -> tuple[int, str, str]:
    """`hub push` in its own process: the client reads its environment when it is imported."""
    command = [sys.executable, "-W", "ignore", "-c", PUSH, "push", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def mine(expert_folder: Make) -> str:
    """An expert with gates, a task, tags and scores, and its digest."""
    folder = expert_folder(1, rank=8)
    ran = run_hub("add", folder, "--name", "mine", "--task", "bigbench:snarks", "--json")
    assert ran.code == 0, ran.err
    return str(ran.json["expert"]["digest"])


@pytest.fixture
def pushed(server: HfServer, mine: str) -> str:
    code, out, err = push("mine", "hf:alice/mine", "--tag", "v1", "--json")
    assert code == 0, err
    return str(json.loads(out)["pushed"]["commit"])


def forget(home: Path) -> None:
    """Become another user."""
    for name in ("objects", "registry", "hf", "partial"):
        shutil.rmtree(home / name, ignore_errors=True)


def test_it_arrives_whole_and_the_same(
    server: HfServer, mine: str, pushed: str, home: Path
) -> None:
    sent = {f.name: f.read_bytes() for f in map(Store().path, Store().list_objects())}
    forget(home)
    ran = run_hub("pull", "hf:alice/mine", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["pulled"] == [{"name": "mine@1", "digest": mine}]
    expert = Registry.read().find_expert(Reference.parse("mine"))
    assert expert.sources == [f"hf:alice/mine@{pushed}"]
    assert expert.task == "bigbench:snarks"
    assert {f.name: f.read_bytes() for f in map(Store().path, Store().list_objects())} == sent


def test_the_pushed_entry_knows_its_commit(mine: str, pushed: str, home: Path) -> None:
    expert = Registry.read().find_expert(Reference.parse("mine"))
    assert expert.sources[-1] == f"hf:alice/mine@{pushed}"
    shutil.rmtree(expert.sources[0].removeprefix("file:"))
    shutil.rmtree(home / "objects")
    assert run_hub("pull", "mine").code == 0
    assert Store().read_identity(mine).digest == mine


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@{commit}"])
def test_branches_tags_and_commits(
    revision: str, server: HfServer, mine: str, pushed: str, home: Path
) -> None:
    forget(home)
    ran = run_hub("pull", "hf:alice/mine" + revision.format(commit=pushed), "--name", "x")
    assert ran.code == 0, ran.err
    assert Registry.read().find_expert(Reference.parse("x")).digest == mine


def test_a_commit_that_is_here_needs_no_request(server: HfServer, pushed: str, home: Path) -> None:
    forget(home)
    assert run_hub("pull", f"hf:alice/mine@{pushed}").code == 0
    server.requests.clear()
    shutil.rmtree(home / "objects")
    assert run_hub("pull", f"hf:alice/mine@{pushed}").code == 0
    assert server.requests == []


def test_peft_loads_it_to_the_same_logits(
    server: HfServer, pushed: str, base_folder: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    script = (
        "import sys\nfrom huggingface_hub import snapshot_download\n"
        "print(snapshot_download('alice/mine'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert {p.name for p in folder.iterdir()} - {".gitattributes"} == FILES
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    ids = torch.arange(12)[None]
    adapted = PeftModel.from_pretrained(base, folder)
    theirs = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload()(input_ids=ids).logits
    recipe = {
        "base": str(base_folder),
        "experts": ["hf:alice/mine"],
        "merge": {"method": "linear"},
    }
    ours = hub.compose(recipe).model(input_ids=ids).logits
    torch.testing.assert_close(ours, merged, atol=1e-6, rtol=1e-6)
    # peft multiplies the input by one factor after the other, which is rounded otherwise.
    largest = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, atol=1e-5 * largest, rtol=0)


def test_the_card_is_for_the_hub_and_for_people(server: HfServer, pushed: str, home: Path) -> None:
    import httpx

    text = httpx.get(f"{server.url}/alice/mine/resolve/main/README.md").text
    front = yaml_files.parse(text.split("---\n")[1], "README.md").value
    assert front["library_name"] == "peft" and front["base_model_relation"] == "adapter"
    assert "experthub" in front["tags"] and "lora" in front["tags"]
    assert front["datasets"] == ["snarks"]
    assert "hub pull hf:alice/mine" in text


def test_pushing_again_sends_nothing(server: HfServer, pushed: str) -> None:
    server.requests.clear()
    code, _, err = push("mine", "hf:alice/mine", "--json")
    assert code == 0, err
    assert not server.seen(method="PUT")


def test_a_race_is_lost_with_a_way_out(server: HfServer, pushed: str, expert_folder: Make) -> None:
    assert run_hub("add", expert_folder(2), "--name", "other").code == 0
    server.fault(r"/commit/main$", method="POST", status=412, times=1)
    code, _, err = push("other", "hf:alice/mine")
    assert code == 6 and "somebody else pushed" in err and "hub pull" in err


def test_an_answer_that_is_lost(server: HfServer, mine: str) -> None:
    """The commit is there, and nobody said so: pushing again sends nothing more."""
    server.fault(r"/commit/main$", method="POST", lose=True, times=1)
    code, out, err = push("mine", "hf:alice/mine")
    assert (code, out) == (1, "") and "error: cannot push to hf:alice/mine" in err
    assert "Traceback" not in err and "pushing again" in err
    server.requests.clear()
    assert push("mine", "hf:alice/mine")[0] == 0
    assert not server.seen(method="PUT") and not server.seen(r"/commit/", "POST")


@pytest.mark.parametrize(
    ("login", "target", "code"),
    [
        ("hf_read", "hf:alice/new", 5),
        ("hf_other", "hf:alice/new", 5),
        ("nonsense", "hf:alice/new", 5),
        ("", "hf:alice/new", 5),
        ("hf_write", "s3:alice/new", 2),
        ("hf_write", "hf:", 2),
    ],
)
def test_who_may_not_push(
    login: str, target: str, code: int, server: HfServer, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", login)
    found, out, err = push("mine", target)
    assert (found, out) == (code, "") and err.count("error: ") == 1, err
    assert login not in err or not login
    assert not server.seen(r"/commit/")


def test_a_dry_run_sends_nothing(server: HfServer, mine: str) -> None:
    code, out, _ = push("mine", "hf:alice/mine", "--dry-run", "--json")
    assert code == 0 and set(json.loads(out)["pushed"]["files"]) == FILES
    assert not server.requests


def test_private_repositories(
    server: HfServer, mine: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert push("mine", "hf:alice/secret", "--private")[0] == 0
    forget(home)
    monkeypatch.delenv("HF_TOKEN")
    ran = run_hub("pull", "hf:alice/secret")
    assert ran.code == 4 and "is private" in ran.err and "HF_TOKEN" in ran.err
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    assert run_hub("pull", "hf:alice/secret").code == 0


WEIGHTS = r"/resolve/.*adapter_model\.safetensors"


@pytest.mark.parametrize("how", [{"cut": 1000}, {"status": 503}, {"status": 429}])
def test_what_passes_is_tried_again(
    how: dict[str, Any], server: HfServer, mine: str, pushed: str, home: Path
) -> None:
    forget(home)
    fault = server.fault(WEIGHTS, times=2, **how)
    ran = run_hub("pull", "hf:alice/mine")
    assert ran.code == 0, ran.err
    assert fault.hits == 2 and Store().read_identity(mine)


def test_a_pull_goes_on_where_it_stopped(
    server: HfServer, mine: str, pushed: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(home)
    monkeypatch.setattr(_http, "TRIES", 1)
    server.fault(WEIGHTS, cut=1000, times=1)
    assert run_hub("pull", "hf:alice/mine").code == 1
    assert 1000 in {p.stat().st_size for p in (home / "partial").iterdir()}
    server.requests.clear()
    assert run_hub("pull", "hf:alice/mine").code == 0
    assert [r.headers.get("range") for r in server.seen(WEIGHTS)] == ["bytes=1000-"]


def test_a_folder_of_pickles_is_refused(server: HfServer, home: Path, tmp_path: Path) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=server.url, token="hf_write")
    api.create_repo("alice/pickle")
    files = {"adapter_model.bin": b"cos\nsystem\n", "adapter_config.json": b"{}"}
    adds = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=c) for n, c in files.items()]
    api.create_commit("alice/pickle", adds, commit_message="x")
    ran = run_hub("pull", "hf:alice/pickle")
    assert ran.code == 3 and "pickles are never read" in ran.err
    assert not list((home / "objects").rglob("*"))


def test_two_pulls_at_once(server: HfServer, mine: str, pushed: str, home: Path) -> None:
    forget(home)
    codes: list[int] = []

    def pull() -> None:
        command = [sys.executable, "-c", PUSH, "pull", "hf:alice/mine"]
        codes.append(subprocess.run(command, capture_output=True).returncode)

    threads = [threading.Thread(target=pull) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0, 0] and Store().read_identity(mine)


@pytest.mark.parametrize(
    ("kind", "library", "relation", "words"),
    [
        ("lora", "peft", "adapter", ["experts: [hf:o/x]", "PeftModel"]),
        ("task_vector", "transformers", "finetune", ["experts: [hf:o/x]"]),
        ("skills", "experthub", None, []),
        ("coefficients", "experthub", None, ["coefficients: hf:o/x"]),
        ("router", "experthub", None, ["router: hf:o/x"]),
    ],
)
def test_the_card_of_each_kind(
    kind: str, library: str, relation: str | None, words: list[str]
) -> None:
    digest = "sha256:" + "0" * 64
    expert = hub.Expert(name="x", kind=kind, base="tiny", sources=["./x"], digest=digest)
    identity = Identity(kind=kind, base_fingerprint=None, files={})
    text = format_model_card(expert, identity, Registry(()), "o/x")
    front = yaml_files.parse(text.split("---\n")[1], "README.md").value
    assert (front["library_name"], front.get("base_model_relation")) == (library, relation)
    assert "hub pull hf:o/x" in text and all(word in text for word in words)
    assert ("merge: {method: linear}" in text) == (kind in ("lora", "task_vector"))
