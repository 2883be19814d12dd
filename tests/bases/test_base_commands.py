"""`hub base`: names for folders, GGUF files and Ollama's blobs, and a GGUF path as a base."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_expert, run_hub, tiny_llama
from experthub.hub.bases import base as bases
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.gguf import READABLE, convert_gguf, join_gguf
from experthub.hub.errors import HubError
from experthub.hub.files import yaml_files
from experthub.hub.formats.gguf_header import check_gguf
from experthub.hub.session import Session
from peft_kinds import make_adapter
from safetensors.torch import load_file
from tiny_gguf import write_gguf


def write_recipe(base: str, expert: Path) -> Path:
    content = {"base": base, "experts": [str(expert)], "merge": {"method": "linear"}}
    path = Path("recipe.yaml")
    path.write_text(yaml_files.dump(content))
    return path


def split_gguf(path: Path, count: int = 3) -> list[Path]:
    """Split a file as llama.cpp does: the settings are in the first part."""
    import gguf

    reader = gguf.GGUFReader(path)
    parts = [path.with_name(f"{path.stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        for name, field in reader.fields.items() if number == 0 else []:
            if not name.startswith("GGUF.") and name != "general.architecture":
                array = field.types[0] == gguf.GGUFValueType.ARRAY
                inner = field.types[-1] if array else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_a_folder_gets_a_name(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    ran = run_hub("base", "add", "mine", folder, "--aka", "org/mine", "--license", "mit", "--json")
    assert ran.code == 0, ran.err
    entry = ran.json["base"]
    known = bases.read(folder, "x")
    assert entry["fingerprint"] == known.fingerprint and entry["digest"] == known.digest
    assert entry["sources"] == [f"file:{folder}"] and entry["aka"] == ["org/mine"]
    assert run_hub("base", "add", "mine", folder, "--aka", "org/mine", "--license", "mit").code == 0
    assert "mine" in run_hub("base", "list", "-q").out.split()
    for words in (("base", "show"), ("show",)):
        shown = run_hub(*words, "mine")
        assert known.digest in shown.out and "mit" in shown.out, shown.err
    recipe = write_recipe("org/mine", make_expert(tmp_path / "expert", folder, 1))
    plan = run_hub("compose", recipe, "--json")
    assert plan.code == 0 and plan.json["plan"]["base"]["name"] == "mine", plan.err
    assert run_hub("verify").code == 0
    assert run_hub("base", "rm", "mine").code == 0
    assert (folder / "config.json").exists()
    missing = run_hub("base", "show", "mine")
    assert missing.code == 4 and "Traceback" not in missing.err


def test_a_name_is_not_taken_from_another_base(tmp_path: Path) -> None:
    first, second = (tiny_llama(tmp_path / str(seed), seed) for seed in (1, 2))
    assert run_hub("base", "add", "mine", first).code == 0
    ran = run_hub("base", "add", "mine", second)
    assert ran.code == 6 and "is already a base with other weights" in ran.err
    ran = run_hub("base", "add", "smollm2-135m-instruct", first)
    assert ran.code == 6, ran.err
    ran = run_hub("base", "add", "other", second, "--aka", "mine")
    assert ran.code == 6 and "another name of the base mine" in ran.err
    ran = run_hub("base", "add", "Mine", second)
    assert ran.code == 2
    ran = run_hub("base", "rm", "mien")
    assert ran.code == 4 and "did you mean 'mine'?" in ran.err
    ran = run_hub("base", "rm", "smollm2-135m-instruct")
    assert ran.code == 4 and "not of your own registry" in ran.err


def test_a_base_with_experts_is_not_removed(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    assert run_hub("base", "add", "mine", folder).code == 0
    expert = make_expert(tmp_path / "expert", folder, 1)
    assert run_hub("add", expert, "--name", "one", "--base", "mine").code == 0
    ran = run_hub("base", "rm", "mine")
    assert ran.code == 6 and ran.lines("hint:") == ["hint: run hub rm one@1 first"]
    assert run_hub("rm", "one@1", "--yes").code == 0
    assert run_hub("base", "rm", "mine").code == 0


def test_a_gguf_file_is_a_base(tmp_path: Path, home: Path) -> None:
    file = write_gguf(tmp_path / "Tiny.gguf")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "theirs.Config"}}')
    expected = tmp_path / "expected"
    expected.mkdir()
    convert_gguf(file, expected)
    expert = make_expert(tmp_path / "expert", expected, 1)
    shutil.copy(file, "tiny.gguf")
    recipe = write_recipe("./tiny.gguf", expert)
    ran = run_hub("compose", recipe, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["plan"]["base"]["sha256"] == sha256(file.read_bytes()).hexdigest()
    assert ran.json["plan"]["base"]["fingerprint"] == bases.read(expected, "x").fingerprint
    assert "converting GGUF" in ran.err and "de-quantizing" not in ran.err
    again = run_hub("compose", recipe, "--json")
    assert "converting" not in again.err
    ran = run_hub("base", "add", "tiny", "tiny.gguf", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["base"]["sha256"] == sha256(file.read_bytes()).hexdigest()
    write_recipe("tiny", expert)
    assert run_hub("compose", recipe, "--out", tmp_path / "out").code == 0
    made = find("tiny", Session()).folder
    assert made.parent == home / "bases"
    weights = made / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run_hub("verify").code == 3
    assert run_hub("verify", "--repair").code == 0
    assert find("tiny", Session()).fingerprint == bases.read(expected, "x").fingerprint
    Path("tiny.gguf").unlink()  # The converted folder is all that is needed.
    assert run_hub("compose", recipe).code == 0
    assert run_hub("base", "rm", "tiny").code == 0
    assert not made.exists()


def test_an_expert_of_a_gguf_file_is_compared_with_peft(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    expert = make_expert(tmp_path / "expert", find(str(file), Session()).folder, 1)
    ran = run_hub("add", expert, "--name", "one", "--base", file, "--proof", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["expert"]["proof"]["against"].startswith("peft")


def test_an_adapter_that_names_the_folder_of_a_base_gets_its_name(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    assert run_hub("base", "add", "mine", folder).code == 0
    expert = make_expert(tmp_path / "expert", folder, 1, base_model_name_or_path=str(folder))
    assert run_hub("add", expert, "--name", "one").code == 0
    assert run_hub("show", "one", "--json").json["expert"]["base"] == "mine"
    other = make_expert(tmp_path / "other", folder, 2, base_model_name_or_path=f"{folder}-2")
    assert run_hub("add", other, "--name", "two").code == 0
    assert run_hub("show", "two", "--json").json["expert"]["base"] == f"{folder}-2"


def test_a_gguf_file_is_converted_once_and_removed_with_its_name(
    tmp_path: Path, home: Path
) -> None:
    write_gguf(tmp_path / "Weights.gguf")
    ran = run_hub("base", "add", "mine", tmp_path / "Weights.gguf")
    assert ran.code == 0 and "converting" in ran.err
    assert "not stored here" not in run_hub("base", "show", "mine").out
    assert "converting" not in run_hub("pull", "mine").err
    assert [folder.name[:5] for folder in (home / "bases").iterdir()] == ["mine-"]
    assert run_hub("base", "rm", "mine").code == 0
    assert not any((home / "bases").iterdir())


def test_a_changed_gguf_file_is_another_base(tmp_path: Path) -> None:
    file = write_gguf(Path("tiny.gguf"))
    first = find("./tiny.gguf", Session())
    assert run_hub("base", "add", "tiny", "./tiny.gguf").code == 0
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    second = find("./tiny.gguf", Session())
    assert first.fingerprint != second.fingerprint and first.folder != second.folder
    assert find("tiny", Session()).fingerprint == first.fingerprint
    shutil.rmtree(find("tiny", Session()).folder)
    ran = run_hub("pull", "tiny")
    assert ran.code == 3 and "restore the registered file" in ran.err


def test_parts_of_a_gguf_file_are_joined(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf")
    parts = split_gguf(whole)
    (tmp_path / "expected").mkdir()
    convert_gguf(whole, tmp_path / "expected")
    found = find(str(parts[1]), Session())
    ours, expected = (
        load_file(folder / "model.safetensors") for folder in (found.folder, tmp_path / "expected")
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert (found.folder / "tokenizer.json").read_bytes() == (
        tmp_path / "expected" / "tokenizer.json"
    ).read_bytes()
    parts[2].unlink()
    ran = run_hub("base", "add", "tiny", parts[0])
    assert ran.code == 4 and f"{parts[2].name} is missing" in ran.err


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    parts = split_gguf(write_gguf(tmp_path / "tiny.gguf"))
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    with pytest.raises(HubError, match="is not a whole GGUF file"):
        join_gguf(parts, tmp_path / "joined.gguf")


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ollama's folder with the models `tiny:1b` and `alice/tiny`."""
    root = tmp_path / "ollama"
    monkeypatch.setenv("OLLAMA_MODELS", str(root))
    file = write_gguf(tmp_path / "tiny.gguf")
    digest = sha256(file.read_bytes()).hexdigest()
    (root / "blobs").mkdir(parents=True)
    file.rename(root / "blobs" / f"sha256-{digest}")
    kinds = {"model": f"sha256:{digest}", "template": f"sha256:{'0' * 64}"}
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": value}
        for kind, value in kinds.items()
    ]
    for name in ("library/tiny/1b", "alice/tiny/latest"):
        manifest = root / "manifests" / "registry.ollama.ai" / name
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return root


def test_models_of_ollama_are_bases(ollama: Path) -> None:
    ran = run_hub("base", "add", "mine", "ollama:tiny:1b", "--json")
    assert ran.code == 0, ran.err
    (blob,) = (ollama / "blobs").iterdir()
    assert ran.json["base"]["sources"] == [f"file:{blob}"]
    assert ran.json["base"]["aka"] == ["ollama:tiny:1b"]
    assert blob.name == f"sha256-{ran.json['base']['sha256']}"
    for name in ("ollama:alice/tiny", str(blob)):
        assert find(name, Session()).fingerprint == ran.json["base"]["fingerprint"]


def test_an_adapter_is_converted_for_a_model_of_ollama(ollama: Path, tmp_path: Path) -> None:
    adapter, made = tmp_path / "adapter", {}
    make_adapter("IA3", find("ollama:tiny:1b", Session()).folder, adapter, "llama")
    for name in ("ollama:tiny:1b", str(find("ollama:tiny:1b", Session()).folder)):
        out = tmp_path / f"out{len(made)}"
        ran = run_hub("convert", adapter, out, "--base", name)
        assert ran.code == 0, ran.err
        (file,) = out.glob("*.safetensors")
        made[name] = load_file(file)
    one, other = made.values()
    assert one and one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("source", "code", "message", "hint"),
    [
        ("ollama:tini:1b", 4, "Ollama has no model tini:1b", "did you mean 'ollama:tiny:1b'?"),
        ("ollama:../../x", 2, "is not a source", "write ollama:NAME"),
        ("ollama:tiny:../1b", 2, "is not a source", "write ollama:NAME"),
        ("./nothing.gguf", 4, "there is no file", "name an existing GGUF file"),
        ("nothing", 4, "no registry has a base named", ""),
        ("tokenizer.txt", 4, "there is no model folder", ""),
    ],
)
def test_what_is_no_base_is_refused(
    source: str, code: int, message: str, hint: str, ollama: Path
) -> None:
    Path("tokenizer.txt").write_text("x")
    ran = run_hub("base", "add", "mine", source)
    assert ran.code == code and message in ran.err and hint in ran.err, ran.err


def test_a_manifest_of_ollama_leads_nowhere_else(ollama: Path) -> None:
    manifest = ollama / "manifests/registry.ollama.ai/library/tiny/1b"
    for digest in ("sha256:../../../etc/passwd", "../x", f"sha256:{'1' * 64}"):
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest}
        manifest.write_text(json.dumps({"layers": [layer]}))
        ran = run_hub("base", "add", "mine", "ollama:tiny:1b")
        assert ran.code == 3, ran.err


def test_types_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    import gguf
    from gguf.quants import _type_traits

    readable = {int(kind) for kind in _type_traits} | {0, 1}
    assert readable == READABLE
    path = write_gguf(tmp_path / "tiny.gguf")
    info = gguf.GGUFReader(path).tensors[0]
    content = bytearray(path.read_bytes())
    name = info.name.encode()
    at = content.index(name) + len(name) + 4 + 8 * len(info.shape)
    content[at : at + 4] = (41).to_bytes(4, "little")
    path.write_bytes(content)
    assert check_gguf(path) == {0, 41}
    with pytest.raises(HubError, match="tensors of the type Q1_0") as caught:
        convert_gguf(path, tmp_path)
    assert "Q4_K_M" in str(caught.value.hint)


def test_a_folder_with_a_gguf_file_names_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    ran = run_hub("base", "add", "mine", tmp_path)
    assert ran.code == 4 and f"name the file, {tmp_path / 'tiny.gguf'}" in ran.err


def test_terms_are_shown_with_a_base_and_before_it_is_fetched(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    entry: dict[str, Any] = {"sources": [f"file:{file}"], "terms": "https://example.org/terms"}
    Path("registry.yaml").write_text(yaml_files.dump({"version": 1, "bases": {"own": entry}}))
    assert "https://example.org/terms" in run_hub("show", "own").out
    ran = run_hub("pull", "own")
    assert ran.code == 0 and "note: own comes under these terms" in ran.err, ran.err
    assert "terms" not in run_hub("pull", "own").err


def test_the_entry_of_a_base_that_lies_elsewhere_is_damage(tmp_path: Path, home: Path) -> None:
    assert run_hub("base", "add", "mine", tiny_llama(tmp_path / "model")).code == 0
    assert run_hub("verify").code == 0
    (home / "registry/mine").rename(home / "registry/other")
    ran = run_hub("verify")
    assert ran.code == 3 and "its name and version differ from its path" in ran.out + ran.err
