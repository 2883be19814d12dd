"""Shared folders, archives and portable adapters: what is written is what arrives."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import at_once, logits, make_expert, run_hub, snapshot
from experthub import hub
from experthub.hub.formats import tar
from experthub.hub.formats.adapter import GATES
from experthub.hub.registry.expert import (
    Expert,
    Reference,
    make_source_absolute,
    make_source_relative,
)
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from safetensors.torch import load_file, save_file

Make = Callable[..., Path]


def expert(name: str) -> Expert:
    return Registry.read().find_expert(Reference.parse(name))


def forget(home: Path) -> None:
    """Become another user."""
    shutil.rmtree(home)


@pytest.fixture
def two(expert_folder: Make) -> dict[str, str]:
    """Two experts by name, with their digests."""
    for seed, name in enumerate(("one", "two")):
        folder = expert_folder(seed, rank=4)
        assert run_hub("add", folder, "--name", name, "--description", f"number {seed}").code == 0
        shutil.rmtree(folder)
    return {name: expert(name).digest for name in ("one", "two")}


def stored() -> dict[str, bytes]:
    return {sha256: path.read_bytes() for sha256, path in Store().list_objects().items()}


def test_a_shared_folder(two: dict[str, str], home: Path, tmp_path: Path) -> None:
    before = stored()
    ran = run_hub("push", "one", "file:../shared", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["pushed"]["source"] == f"file:{tmp_path}/shared#one@1"
    assert run_hub("push", "two", f"file:{tmp_path}/shared").code == 0
    assert expert("two").sources[-1] == f"file:{tmp_path}/shared#two@1"
    forget(home)
    ran = run_hub("pull", "file:../shared", "--json")
    assert ran.code == 0, ran.err
    assert {p["name"]: p["digest"] for p in ran.json["pulled"]} == {
        f"{name}@1": digest for name, digest in two.items()
    }
    assert stored() == before and expert("one").description == "number 0"
    assert not list((home / "drafts").iterdir())
    shutil.rmtree(home / "objects")  # what was pulled knows where it came from
    assert run_hub("pull", "one").code == 0 and Store().read_identity(two["one"])


def test_one_of_several(two: dict[str, str], home: Path) -> None:
    for name in two:
        run_hub("push", name, "file:shared")
    forget(home)
    assert run_hub("pull", "file:shared#two@1", "--name", "zwei").code == 0
    assert [e.name for e in Registry.read().user.content.experts] == ["zwei"]
    for words, code, message in (
        (["pull", "file:shared#twoo@1"], 4, "did you mean 'two@1'?"),
        (["pull", "file:shared", "--name", "x"], 2, "holds 2 experts"),
        (["pull", "file:nowhere"], 4, "nowhere"),
    ):
        ran = run_hub(*words)
        assert ran.code == code and message in ran.err, ran.err


def test_recipes_name_shared_experts(
    two: dict[str, str], base_folder: Path, home: Path, tmp_path: Path
) -> None:
    run_hub("export", "one", "two", "both.tar")
    forget(home)
    use = {"base": str(base_folder), "merge": {"method": "linear"}}
    for place in ("file:both.tar#two@1", f"file:{tmp_path}/work/both.tar#two@1"):
        Path("recipe.yaml").write_text(json.dumps(use | {"experts": [place]}))
        plan = hub.plan_of("recipe.yaml")
        assert plan.members[0].digest == two["two"]
    assert run_hub("lock", "recipe.yaml").code == 0
    assert "file:both.tar#two@1" in Path("recipe.lock.yaml").read_text()
    forget(home)
    assert hub.plan_of("recipe.yaml", "frozen").members[0].digest == two["two"]
    Path("recipe.yaml").write_text(json.dumps(use | {"experts": ["file:both.tar"]}))
    ran = run_hub("compose", "recipe.yaml")
    assert ran.code == 2 and "one@1, two@1" in ran.err


def test_another_content_under_the_name_is_a_conflict(
    two: dict[str, str], expert_folder: Make, home: Path
) -> None:
    run_hub("push", "one", "file:shared")
    assert run_hub("push", "one", "file:shared").code == 0
    forget(home)
    run_hub("add", expert_folder(7), "--name", "one")
    before = snapshot(Path("shared"))
    ran = run_hub("push", "one", "file:shared")
    assert ran.code == 6 and "one@1" in ran.err
    assert snapshot(Path("shared")) == before


def test_what_others_keep_in_the_folder_stays(two: dict[str, str]) -> None:
    run_hub("push", "one", "file:shared")
    index = json.loads(Path("shared/index.json").read_text())
    foreign = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": "sha256:" + "0" * 64,
        "size": 3,
        "platform": {"architecture": "amd64", "os": "linux"},
    }
    index["manifests"].append(foreign)
    Path("shared/index.json").write_text(json.dumps(index))
    assert run_hub("push", "two", "file:shared").code == 0
    entries = json.loads(Path("shared/index.json").read_text())["manifests"]
    assert len(entries) == 3 and foreign in entries


def test_pushing_where_something_else_is(two: dict[str, str]) -> None:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    assert run_hub("push", "one", "file:mine").code == 6
    assert [p.name for p in Path("mine").iterdir()] == ["letter.txt"]
    assert run_hub("push", "one", "ftp:mine").code == 2
    assert run_hub("push", "one", "file:new", "--tag", "x").code == 2
    assert run_hub("push", "one", "file:new", "--dry-run").out.endswith("nothing was sent\n")
    assert not Path("new").exists()


def test_processes_push_to_one_folder_at_once(two: dict[str, str], expert_folder: Make) -> None:
    names = [f"e-{i}" for i in range(4)]
    for seed, name in enumerate(names):
        run_hub("add", expert_folder(seed + 10), "--name", name)
    script = (
        "import sys\nfrom experthub.cli.main import app\n"
        "print('ready', flush=True)\ninput()\napp(['push', sys.argv[1], 'file:shared'])"
    )
    at_once(script, *[[name] for name in names])
    entries = json.loads(Path("shared/index.json").read_text())["manifests"]
    found = {e["annotations"]["org.opencontainers.image.ref.name"] for e in entries}
    assert found == {f"{name}@1" for name in names}


def test_one_expert_makes_one_manifest(two: dict[str, str], tmp_path: Path) -> None:
    digests = []
    for place in ("a", "b"):
        digests.append(run_hub("push", "one", f"file:{place}", "--json").json["pushed"]["commit"])
    run_hub("export", "two", "one", "a.tar")
    run_hub("export", "one", "two", "b.tar")
    assert digests[0] == digests[1]
    assert Path("a.tar").read_bytes() == Path("b.tar").read_bytes()
    blob = Path("a/blobs") / digests[0].replace(":", "/")
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    manifest = json.loads(blob.read_text())
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert {x["annotations"]["org.opencontainers.image.title"] for x in manifest["layers"]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        GATES,
        "expert.json",
    }


def test_an_archive(two: dict[str, str], home: Path, tmp_path: Path) -> None:
    before = stored()
    ran = run_hub("export", "one", "two@1", "x.tar", "--json")
    assert ran.code == 0 and [e["name"] for e in ran.json["exported"]] == ["one@1", "two@1"]
    with tarfile.open("x.tar") as archive:
        assert {"oci-layout", "index.json"} < set(archive.getnames())
        assert {m.mtime for m in archive} == {0}
    assert run_hub("export", "one", "x.tar").code == 6
    forget(home)
    ran = run_hub("import", "x.tar")
    assert ran.code == 0, ran.err
    assert stored() == before and expert("two").sources == [f"file:{tmp_path}/work/x.tar#two@1"]
    assert run_hub("import", "x.tar").code == 0
    assert len(Registry.read().user.content.experts) == 2
    assert run_hub("import", "y.tar").code == 4
    assert run_hub("export", "one", "two").code == 2


def test_archives_of_other_programs(two: dict[str, str], home: Path) -> None:
    run_hub("push", "one", "file:shared")
    with tarfile.open("x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add("shared", "./", filter=lambda m: None if ".lock" in m.name else m)
        archive.pax_headers = {"comment": "hello"}
    forget(home)
    assert run_hub("import", "x.tar").code == 0
    assert Store().read_identity(two["one"])


def rewritten(change: Callable[[tarfile.TarInfo, bytes], Any]) -> None:
    """Write x.tar again, each member changed; several, or none, may take a member's place."""
    with tarfile.open("x.tar") as old, tarfile.open("y.tar", "w") as new:
        for member in old:
            data = old.extractfile(member)
            for made, content in change(member, data.read() if data else b""):
                made.size = len(content)
                new.addfile(made, io.BytesIO(content))
    Path("y.tar").replace("x.tar")


def flipped(name: str, content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:] if name else content


def outside(member: tarfile.TarInfo, content: bytes) -> Any:
    copy = tarfile.TarInfo("../../evil" if member.name == "oci-layout" else member.name)
    return [(copy, content)]


def with_link(member: tarfile.TarInfo, content: bytes) -> Any:
    link = tarfile.TarInfo("blobs/sha256/" + "1" * 64)
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return [(member, content), (link, b"")] if member.name == "index.json" else [(member, content)]


HOSTILE: dict[str, tuple[Callable[[tarfile.TarInfo, bytes], Any], int]] = {
    "a link": (with_link, 3),
    "the same name twice": (lambda m, c: [(m, c)] * (2 if m.name == "index.json" else 1), 3),
    "no index": (lambda m, c: [] if m.name == "index.json" else [(m, c)], 3),
    "a blob less": (lambda m, c: [] if len(c) > 5000 else [(m, c)], 3),
    "a flipped bit": (lambda m, c: [(m, flipped("x", c) if len(c) > 5000 else c)], 3),
    "a longer blob": (lambda m, c: [(m, c + b"0" if len(c) > 5000 else c)], 3),
    "an index that is none": (lambda m, c: [(m, b"[]" if m.name == "index.json" else c)], 3),
    "a deep index": (lambda m, c: [(m, b"[" * 99999 if m.name == "index.json" else c)], 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(name: str, two: dict[str, str], home: Path, tmp_path: Path) -> None:
    change, code = HOSTILE[name]
    run_hub("export", "one", "x.tar")
    rewritten(change)
    forget(home)
    before = snapshot(tmp_path)
    ran = run_hub("import", "x.tar")
    assert ran.code == code and len(ran.lines("error:")) == 1, ran.err
    assert snapshot(tmp_path) == before


def test_a_name_outside_is_no_place_to_write(
    two: dict[str, str], home: Path, tmp_path: Path
) -> None:
    """Members are read by place; their names are compared, never used."""
    run_hub("export", "one", "x.tar")
    rewritten(outside)
    forget(home)
    assert run_hub("import", "x.tar").code == 0
    assert not list(tmp_path.parent.rglob("evil"))


@pytest.mark.parametrize("cut", [100, 512, 700, 5000, -600, -20000])
def test_cut_archives(cut: int, two: dict[str, str], home: Path) -> None:
    run_hub("export", "one", "x.tar")
    whole = Path("x.tar").read_bytes()
    end = max(tar.list_members(Path("x.tar")).values())
    assert sum(end) <= len(whole)
    Path("x.tar").write_bytes(whole[: cut if cut > 0 else sum(end) + cut])
    forget(home)
    ran = run_hub("import", "x.tar")
    assert ran.code == 3 and "x.tar" in ran.err
    assert not list((home).rglob("objects/*/*/*"))


def test_large_sizes_are_read(tmp_path: Path) -> None:
    """Above 8 GiB sizes are not octal any more."""
    member = tarfile.TarInfo("big")
    member.size = 9 << 30
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + member.size)
        file.write(bytes(1024))
    assert tar.list_members(path) == {"big": (512, 9 << 30)}


def narrow(folder: Path, modules: str, rank: int) -> None:
    """Cut an adapter's factors of some modules to a lower rank."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if modules in n]:
        side = 0 if "lora_A" in name else 1
        tensors[name] = tensors[name].narrow(side, 0, rank).contiguous()
    save_file(tensors, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {modules: rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "lora_alpha": 8},
        {"rank": 4, "lora_alpha": 6},
        {"rank": 4, "rank_pattern": {"q_proj": 4, "k_proj": 4}, "alpha_pattern": {"v_proj": 1}},
        {"rank": 4, "use_rslora": True},
    ],
)
def test_portable_adapters_compute_the_same(
    options: dict[str, Any], base_folder: Path, tmp_path: Path, expert_folder: Make
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_expert(tmp_path / "own", base_folder, 3, **options)
    if "rank_pattern" in options:
        narrow(folder, "o_proj", 2)
    run_hub("add", folder, "--name", "own")
    ran = run_hub("export", "own", "--portable", "out")
    assert ran.code == 0, ran.err
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and config["use_rslora"] is False
    assert not {"rank_pattern", "alpha_pattern"} & set(config)
    of = [
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), place))
        for place in (folder, Path("out"))
    ]
    torch.testing.assert_close(of[0], of[1], atol=1e-5, rtol=1e-5)
    assert run_hub("export", "own", "--portable", "out").code == 6
    assert run_hub("export", "own", "own", "--portable", "new").code == 2


def test_sources_with_a_name_behind_them(tmp_path: Path) -> None:
    whole = make_source_absolute("file:a/b#c@2", tmp_path)
    assert whole == f"file:{tmp_path}/a/b#c@2"
    assert make_source_relative(whole, tmp_path) == "file:a/b#c@2"
    assert Reference.parse("file:/runs/run#3").folder == Path("/runs/run#3")
    assert Reference.parse("file:/runs/run#3").member == ""


def test_the_default_name_of_a_folder(home: Path, expert_folder: Make) -> None:
    """An @ in the path belongs to the path."""
    folder = Path("a@b") / "Mine@Home"
    shutil.copytree(expert_folder(1), folder)
    ran = run_hub("pull", f"file:{folder}", "--json")
    assert ran.code == 0, ran.err
    assert [e["name"] for e in ran.json["pulled"]] == ["mine-home@1"]
    folder.rename("_")
    ran = run_hub("pull", "file:_")
    assert ran.code == 2 and "choose a name with --name" in ran.err


def test_a_name_for_an_expert_that_nobody_knows(home: Path) -> None:
    ran = run_hub("pull", "typo", "--name", "x")
    assert ran.code == 4 and "no registry has an expert named 'typo'" in ran.err


def test_what_a_killed_push_left_does_not_stop_the_next(two: dict[str, str]) -> None:
    assert run_hub("push", "one", "file:shared").code == 0
    (Path("shared") / ".index.json.0123456789abcdef").write_text("half")
    ran = run_hub("push", "two", "file:shared")
    assert ran.code == 0, ran.err
