"""Registries: names for digests, layer over layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import at_once, run_hub, snapshot
from experthub.hub.errors import ConflictError, HubError, NotFoundError, UsageError
from experthub.hub.files import yaml_files
from experthub.hub.registry.entries import check_name, find_next_version, register
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session
from experthub.hub.store.store import Store
from experthub.hub.transfer.describe import add_folder
from experthub.hub.transfer.pull_by_name import pull_by_name

Make = Callable[..., Path]


def digest(character: str, end: str = "") -> str:
    return "sha256:" + character * (64 - len(end)) + end


def entry(name: str = "x", version: int = 1, mark: str = "a", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "base": "b",
        "sources": ["file:folder"],
        "digest": digest(mark),
    } | more


def write(path: Path, *experts: Mapping[str, Any], **bases: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml_files.dump({"version": 1, "bases": bases, "experts": list(experts)}))
    return path


def find(text: str, file: Path | None = None) -> Expert:
    return Registry.read(file).find_expert(Reference.parse(text))


def user_file(home: Path, name: str = "x", version: int = 1) -> Path:
    return home / "registry" / name / f"{version}.yaml"


def test_the_nearest_layer_wins(tmp_path: Path, home: Path) -> None:
    """The file given, the current folder's, the user's own."""
    write(user_file(home), entry(mark="a"))
    assert find("x").digest == digest("a")
    write(tmp_path / "work" / "registry.yaml", entry(mark="b"))
    assert find("x").digest == digest("b")
    given = write(tmp_path / "elsewhere" / "mine.yaml", entry(mark="c"))
    assert find("x", given).digest == digest("c")
    assert find("x").digest == digest("b")
    shown = run_hub("show", "x", "--registry", given, "--json").json["expert"]
    assert shown["digest"] == digest("c")


def test_a_parent_folders_registry_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "work" / "registry.yaml", entry(mark="a"))
    deep = tmp_path / "work" / "one" / "two"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert find("x").digest == digest("a")
    write(deep.parent / "registry.yaml", entry(mark="b"))
    assert find("x").digest == digest("b"), "the nearest parent's, and only that"
    write(deep.parent / "registry.yaml", entry("y"))
    with pytest.raises(NotFoundError):
        find("x")


def test_layers_add_up(tmp_path: Path, home: Path) -> None:
    write(user_file(home, "mine"), entry("mine"))
    write(tmp_path / "work" / "registry.yaml", entry("ours"), tiny={"sources": ["file:b"]})
    names = {e.name for e in Registry.read().list_experts()}
    assert {"mine", "ours"} <= names
    bases = Registry.read().list_bases()
    assert {"tiny", "smollm2-135m-instruct"} <= set(bases), "the starter registry is the last layer"


def test_versions(tmp_path: Path) -> None:
    write(
        tmp_path / "work" / "registry.yaml",
        entry(version=2, mark="b"),
        entry(version=10, mark="c"),
        entry(version=1, mark="a"),
    )
    assert find("x").version == 10, "the newest, by number"
    assert find("x@2").digest == digest("b")
    assert find("x@1").digest == digest("a")
    with pytest.raises(NotFoundError, match="no registry has x@3") as caught:
        find("x@3")
    assert {"x@1", "x@2", "x@10"} <= set(caught.value.hint.replace(",", "").split())


def test_a_bare_name_is_the_nearest_layers(tmp_path: Path, home: Path) -> None:
    """The first layer that knows the name wins, and what is pinned is found in any."""
    write(user_file(home, version=3), entry(version=3, mark="c"))
    write(tmp_path / "work" / "registry.yaml", entry(version=1, mark="a"))
    assert find("x").reference == "x@1"
    assert find("x@3").digest == digest("c")
    assert find(f"x@{digest('c')[:15]}").version == 3
    listed = [e.reference for e in Registry.read().list_experts() if e.name == "x"]
    assert listed == ["x@1", "x@3"]


def test_digest_prefixes(tmp_path: Path) -> None:
    common = "sha256:" + "ab" * 30
    write(
        tmp_path / "work" / "registry.yaml",
        entry(version=1) | {"digest": f"{common}0001"},
        entry(version=2) | {"digest": f"{common}0002"},
        entry(version=3) | {"digest": f"{common}0001"},
        entry("other", mark="f"),
    )
    assert find(f"x@{common}0002").version == 2
    assert find(f"x@{common}0001").digest == f"{common}0001", "twice the same is not ambiguous"
    with pytest.raises(HubError, match="matches several experts: x@1, x@2, x@3") as caught:
        find(f"x@{common}")
    assert caught.value.code == 1
    with pytest.raises(NotFoundError):
        find("x@sha256:ffffffff")
    with pytest.raises(UsageError, match="not a reference"):
        find("x@sha256:abababa")  # seven digits


@pytest.mark.parametrize(
    "text",
    ["X", "-x", "x@", "x@one", "x@1@2", "x y", "x" * 97, "x@sha256:ABCDEF01", "x@sha256:", "a/b"],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError, match="is not a reference"):
        Reference.parse(text)


@pytest.mark.parametrize(
    "text", ["hf:org/name@main", "pypi:a==1#b", "s3://bucket/x", "oci://h/r:t"]
)
def test_remote_references(text: str) -> None:
    assert Reference.parse(text) == Reference(text, remote=text)


def test_folders_are_relative_to_their_file(tmp_path: Path) -> None:
    near = tmp_path / "near"
    for text in ("./x", "../x", "file:x"):
        found = Reference.parse(text, near).folder
        assert found is not None
        assert found == near / text.removeprefix("file:")
    assert Reference.parse("/x", near).folder == Path("/x")


def test_relative_sources_are_relative_to_the_registry(tmp_path: Path, expert_folder: Make) -> None:
    folder = expert_folder(1)
    target = tmp_path / "shared" / "experts" / "one"
    target.parent.mkdir(parents=True)
    folder.rename(target)
    content = Store().add(target)[0]
    record = entry() | {"sources": ["file:nowhere", "file:experts/one"], "digest": content}
    file = write(tmp_path / "shared" / "registry.yaml", record)
    for path in sorted((tmp_path / "home" / "objects").rglob("*"), reverse=True):
        if path.is_file():
            path.unlink()
    ran = run_hub("pull", "x", "--registry", file)
    assert ran.code == 0, ran.err
    assert Store().read_identity(content).digest == content
    assert find("x").sources[1] == f"file:{target}", "in the user's registry they are absolute"


def test_a_base_is_found_beside_its_registry(tmp_path: Path, base_folder: Path) -> None:
    target = tmp_path / "shared" / "base"
    target.parent.mkdir()
    target.symlink_to(base_folder)
    entry_ = {"sources": ["file:base"], "aka": ["Org/Tiny"]}
    file = write(tmp_path / "shared" / "registry.yaml", tiny=entry_)
    ran = run_hub("pull", "tiny", "--registry", file, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["pulled"][0]["name"] == "tiny"
    assert Registry.read(file).find_base("Org/Tiny")[0] == "tiny"


def test_all_sources_fail(tmp_path: Path) -> None:
    write(tmp_path / "work" / "registry.yaml", entry() | {"sources": ["file:nowhere", "file:gone"]})
    ran = run_hub("pull", "x")
    assert ran.code == 4
    assert "cannot pull x@1: there is no folder" in ran.err and "nowhere" in ran.err
    with pytest.raises(HubError, match=r"^cannot pull x@1: there is no folder"):
        pull_by_name("x", Session())


def test_a_session_knows_what_it_registered(expert_folder: Make) -> None:
    session = Session()
    for version, seed in enumerate((1, 2), 1):
        known = add_folder(expert_folder(seed), "x", session)
        assert known.version == version
        assert session.registry.find_expert(Reference.parse("x")) == known


@pytest.mark.parametrize(
    ("text", "error", "hint"),
    [
        ("version: 1\nbasis: {}\n", "line 2: unknown key 'basis'", "did you mean 'bases'"),
        ("version: 2\n", "line 1: version: .*1", "docs"),
        ("experts: []\n", "the key 'version' is missing", "docs"),
        (
            "version: 1\nbases:\n  b:\n    sources: [x]\n    sha265: a\n",
            "line 5: unknown key 'sha265'",
            "did you mean 'sha256'",
        ),
        ("version: 1\nbases:\n  B C: {sources: [x]}\n", "line 2: .*'B C' is not a name", "docs"),
        (
            "version: 1\nexperts:\n  - name: x\n    verzion: 1\n",
            "line 4: unknown key 'verzion'",
            "did you mean 'version'",
        ),
        (
            "version: 1\nexperts:\n  - name: x\n    base: b\n    sources: [y]\n    digest: abc\n",
            "line 6: experts.0.digest",
            "docs",
        ),
        ("[]", "dictionary", "docs"),
    ],
)
def test_malformed_registries(text: str, error: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "work" / "registry.yaml").write_text(text)
    with pytest.raises(UsageError, match=rf"registry.yaml.*{error}") as caught:
        Registry.read()
    assert hint in caught.value.hint


def test_adding_again_is_a_no_op(home: Path, expert_folder: Make) -> None:
    folder = expert_folder(1)
    assert run_hub("add", folder, "--name", "x").out == "x@1\n"
    before = snapshot(home)
    for words in ([], ["--version", "1"]):
        ran = run_hub("add", folder, "--name", "x", *words)
        assert (ran.code, ran.out) == (0, "x@1\n")
    assert snapshot(home) == before


def test_adding_again_with_another_task_is_a_conflict(home: Path, expert_folder: Make) -> None:
    folder = expert_folder()
    words = ("add", folder, "--name", "x", "--task")
    assert run_hub(*words, "local:a").code == 0
    assert run_hub(*words, "local:a").code == 0
    ran = run_hub(*words, "local:b")
    assert ran.code == 6 and "x@1 has this content, with the task local:a" in ran.err
    assert run_hub("rm", "x@1", "--yes").code == 0
    assert run_hub(*words, "local:b").code == 0


def test_other_content_is_the_next_version(home: Path, expert_folder: Make) -> None:
    assert run_hub("add", expert_folder(1), "--name", "x").out == "x@1\n"
    assert run_hub("add", expert_folder(2), "--name", "x").out == "x@2\n"
    assert user_file(home, "x", 1).is_file() and user_file(home, "x", 2).is_file()
    assert find("x").version == 2


def test_the_same_version_with_other_content_is_a_conflict(home: Path, expert_folder: Make) -> None:
    first, second = expert_folder(1), expert_folder(2)
    assert run_hub("add", first, "--name", "x").code == 0
    before = snapshot(home / "registry")
    ran = run_hub("add", second, "--name", "x", "--version", "1")
    assert (
        ran.code == 6
        and "x@1 is already registered as sha256:" in ran.err
        and "--version 2" in ran.err
    )
    assert snapshot(home / "registry") == before
    with pytest.raises(ConflictError):
        register(Expert(**entry(mark="c")))


def test_one_content_may_have_two_names(expert_folder: Make) -> None:
    folder = expert_folder(1)
    assert run_hub("add", folder, "--name", "x").code == 0
    assert run_hub("add", folder, "--name", "y").code == 0
    assert find("x").digest == find("y").digest


def test_adding_into_a_projects_registry(tmp_path: Path, home: Path, expert_folder: Make) -> None:
    """Its sources are relative where they can be; comments apart, the rest of it stays."""
    file = write(tmp_path / "registry.yaml", entry("other"), tiny={"sources": ["file:b"]})
    folder = expert_folder(1)
    ran = run_hub("add", folder, "--name", "x", "--registry", file, "--description", "one")
    assert ran.code == 0, ran.err
    written = yaml_files.read(file).value
    assert [e["name"] for e in written["experts"]] == ["other", "x"]
    assert written["experts"][1]["sources"] == [f"file:{folder.name}"]
    assert written["experts"][1]["description"] == "one"
    assert written["bases"] == {"tiny": {"sources": ["file:b"]}}
    assert not (home / "registry").exists()
    assert Registry.read(file).find_expert(Reference.parse("x")).sources == [f"file:{folder}"]


def test_a_description_is_taken_over(base_folder: Path, expert_folder: Make) -> None:
    """The fields of expert.json are used unless an option replaces them."""
    from experthub.hub.store.folder import read_folder
    from experthub.hub.transfer.describe import write_description

    folder = expert_folder(1)
    identity = read_folder(folder)
    expert = Expert(
        **entry("x", 3), task="local:t", license="mit", description="theirs", tags=["a"]
    )
    write_description(folder, expert, identity)
    added = add_folder(folder, "x", Session(), description="mine")
    assert added.reference == "x@3"
    assert (added.task, added.license, added.tags) == ("local:t", "mit", ["a"])
    assert (added.description, added.base) == ("mine", "b")


def test_the_base_of_an_adapter_by_its_other_name(tmp_path: Path, expert_folder: Make) -> None:
    write(tmp_path / "work" / "registry.yaml", tiny={"sources": ["file:b"], "aka": ["Org/Tiny"]})
    folder = expert_folder(1, base_model_name_or_path="Org/Tiny")
    assert add_folder(folder, "x", Session()).base == "tiny"
    other = expert_folder(2, base_model_name_or_path="Org/Other")
    assert add_folder(other, "y", Session()).base == "Org/Other"
    nameless = expert_folder(3, base_model_name_or_path=None)
    assert add_folder(nameless, "z", Session()).base == "unknown"
    assert add_folder(other, "w", Session(), base="said").base == "said"


def test_names() -> None:
    assert check_name("a.b_c-1") == "a.b_c-1"
    for name in ("A", "", "-a", "a" * 97, "a/b", "a@1", ".."):
        with pytest.raises(UsageError):
            check_name(name)
    assert find_next_version("x", []) == 1
    assert find_next_version("x", [Expert(**entry(version=4)), Expert(**entry("y", 9))]) == 5


ADD = """
import sys
from experthub.hub.transfer.describe import add_folder
from experthub.hub.session import Session
from pathlib import Path
folder, name, file = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
print(add_folder(Path(folder), name, Session(),
      file=Path(file) if file else None).reference)
"""


def test_two_processes_add_the_same_expert_at_once(expert_folder: Make) -> None:
    folder = expert_folder(1)
    assert at_once(ADD, (folder, "x", ""), (folder, "x", "")) == ["x@1", "x@1"]
    assert [e.reference for e in Registry.read().list_experts() if e.name == "x"] == ["x@1"]
    assert Store().read_identity(find("x").digest)


def test_three_processes_add_to_one_file_at_once(tmp_path: Path, expert_folder: Make) -> None:
    """Every entry is kept."""
    file = tmp_path / "registry.yaml"
    at_once(ADD, *((expert_folder(seed, rank=1), f"x{seed}", file) for seed in range(3)))
    assert {e["name"] for e in yaml_files.read(file).value["experts"]} == {"x0", "x1", "x2"}


def test_a_lost_race_for_a_file_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, without chance: the second writer comes between the first's read and write."""
    file = tmp_path / "registry.yaml"
    read, second = yaml_files.read, threading.Thread()

    def slow(path: Path) -> Any:
        nonlocal second
        document = read(path)
        if not second.ident:
            second = threading.Thread(target=register, args=(Expert(**entry("b")), file))
            second.start()
            second.join(0.5)
        return document

    monkeypatch.setattr(yaml_files, "read", slow)
    write(file, entry("a"))
    register(Expert(**entry("c")), file)
    second.join(30)
    assert [e["name"] for e in yaml_files.read(file).value["experts"]] == ["a", "b", "c"]
