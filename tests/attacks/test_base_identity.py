"""A digest stands for everything that a base computes, and the checked files are the used ones."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_expert, run_hub, tiny_bert, tiny_llama
from experthub import hub
from experthub.hub.bases import base as bases
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.identity import READ_BY_TRANSFORMERS
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.bases.name_map import read_names
from experthub.hub.composition.generation import generate_text
from experthub.hub.errors import HubError, IntegrityError
from experthub.hub.files import yaml_files
from experthub.hub.recipes.lock_file import Lock, lock_path
from experthub.hub.transfer.remotes import hf
from hf_server import HfServer
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.attack
RECIPE = Path("recipe.yaml")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two experts on a base in the current folder, without the fsync of real stores."""
    tiny_llama(Path("base"))
    Path("base/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for number in (1, 2):
        make_expert(Path(f"expert-{number}"), Path("base"), number, size=0.2)
    content = {
        "base": "./base",
        "experts": ["./expert-1", "./expert-2"],
        "merge": {"method": "linear"},
    }
    RECIPE.write_text(yaml_files.dump(content))
    return RECIPE


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file."""

    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def swap_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    words = value["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(value))


def write(name: str, text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return apply


ROPE = {"rope_type": "default", "rope_theta": 500.0}
CHANGES = {
    "rope_theta": edit("config.json", rope_parameters=ROPE),
    "hidden_act": edit("config.json", hidden_act="relu"),
    "rms_norm_eps": edit("config.json", rms_norm_eps=0.1),
    "end of sequence": edit("config.json", eos_token_id=3),
    "generation": edit("generation_config.json", eos_token_id=5),
    "vocabulary": swap_vocabulary,
    "special tokens": edit("tokenizer_config.json", bos_token="</s>"),
    "template": write("chat_template.jinja", "{{ bos_token }}"),
    "another template": write("additional_chat_templates/tools.jinja", "x"),
    "pictures": write("preprocessor_config.json", '{"image_mean": [0, 0, 0]}'),
    "processor": write("processor_config.json", '{"processor_class": "X"}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_behaviour_changes_the_digest(change: str, recipe: Path) -> None:
    assert run_hub("lock", recipe).code == 0
    before = hub.plan_of(recipe)
    CHANGES[change](Path("base"))
    after = hub.plan_of(recipe)
    assert after.base.fingerprint == before.base.fingerprint
    assert after.base.digest != before.base.digest
    assert after.digest != before.digest and after.weights_digest == before.weights_digest
    for pins in ("--frozen", "--locked"):
        ran = run_hub("compose", recipe, pins)
        assert ran.code == 6, ran.err
        assert "configuration, the tokenizer or a processor of" in ran.err


@pytest.mark.parametrize(
    "change",
    [
        edit("config.json", transformers_version="4.0.0", _name_or_path="/elsewhere"),
        edit("generation_config.json", transformers_version="4.0.0"),
        lambda folder: (folder / "README.md").write_text("# other"),
        lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()), indent=7)
        ),
    ],
)
def test_a_record_does_not_change_the_digest(
    change: Callable[[Path], object], recipe: Path
) -> None:
    assert run_hub("lock", recipe).code == 0
    change(Path("base"))
    assert run_hub("compose", recipe, "--frozen").code == 0


def test_every_file_that_a_tokenizer_reads_is_covered() -> None:
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for found in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL):
            names |= set(re.findall(r':\s*"([^"]+)"', found))
    assert len(names) > 10
    assert names <= set(READ_BY_TRANSFORMERS)


def test_cached_scores_are_of_the_present_base(recipe: Path, tiny_task: str) -> None:
    def score() -> Any:
        ran = run_hub("eval", recipe, "--tasks", tiny_task, "--split", "test", "--json")
        assert ran.code == 0, ran.err
        return ran.json["tasks"][0]["methods"]

    first = score()
    edit("config.json", rms_norm_eps=10.0)(Path("base"))
    second = score()
    shutil.rmtree(Path(os.environ["HUB_HOME"]) / "results")
    assert second == score() != first


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "configuration_files", ["config.4.0.0.json"]),
        ("config.json", "transformers_weights", "other.safetensors"),
        ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.4.0.json"]),
    ],
)
def test_a_configuration_leads_to_no_other_file(
    file: str, key: str, value: Any, recipe: Path
) -> None:
    edit(file, **{key: value})(Path("base"))
    shutil.copy("base/config.json", "base/config.4.0.0.json")
    ran = run_hub("compose", recipe, "--out", "out")
    assert ran.code == 3 and key in ran.err
    assert not Path("out").exists()


def test_other_weights_in_the_folder_are_not_loaded(recipe: Path) -> None:
    """transformers prefers a folder with `.metadata`, and takes shards that no index names."""
    before = hub.compose(recipe).model.state_dict()
    Path("base/.metadata").write_bytes(b"a checkpoint of torch.distributed")
    for name in ("model.bin", "pytorch_model.bin"):
        (Path("base") / name).write_bytes(b"a pickle")
    other = {name: tensor + 1 for name, tensor in load_file("base/model.safetensors").items()}
    save_file(other, "base/model-00001-of-00001.safetensors")
    after = hub.compose(recipe).model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def untied(folder: Path) -> Path:
    return tiny_llama(folder, tied=False)


def drop(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        state = load_file(path)
        del state[name]
        save_file(state, path, metadata={"format": "pt"})

    return apply


LACKS = {
    "output embedding": (untied, drop("lm_head.weight")),
    "norm": (untied, drop("model.norm.weight")),
    "projection": (untied, drop("model.layers.1.mlp.up_proj.weight")),
    "more layers": (untied, edit("config.json", num_hidden_layers=3)),
    "another class": (tiny_bert, edit("config.json", architectures=["BertForMaskedLM"])),
    "a head": (untied, edit("config.json", architectures=["LlamaForSequenceClassification"])),
}


@pytest.mark.parametrize("case", LACKS)
def test_weights_that_the_files_lack_are_not_made_up(case: str, tmp_path: Path) -> None:
    make, damage = LACKS[case]
    base = make(tmp_path / "lacking")
    suffix = ("query",) if make is tiny_bert else ("q_proj",)
    make_expert(Path("expert"), base, 1, targets=suffix, gates=False)
    damage(base)
    content = {"base": str(base), "experts": ["./expert"], "merge": {"method": "linear"}}
    RECIPE.write_text(yaml_files.dump(content))
    for words in (["--plan"], ["--out", "out"]):
        ran = run_hub("compose", RECIPE, *words)
        assert ran.code == 3, ran.err
        assert "its files lack" in ran.err
    assert not Path("out").exists()
    with pytest.raises(IntegrityError, match="its files lack"):
        load_model(bases.read(base, "base"), "float32", None)


def test_unused_weights_are_named_in_the_plan(recipe: Path) -> None:
    edit("config.json", num_hidden_layers=1)(Path("base"))
    for number in (1, 2):
        shutil.rmtree(f"expert-{number}")
        make_expert(Path(f"expert-{number}"), Path("base"), number, targets=("0.self_attn.q_proj",))
    ran = run_hub("compose", recipe)
    assert ran.code == 0, ran.err
    assert "not used" in ran.out and "model.layers.1." in ran.out
    unused = run_hub("compose", recipe, "--json").json["plan"]["unused_weights"]
    assert len(unused) == 9 and all(name.startswith("model.layers.1.") for name in unused)


def test_a_shape_that_does_not_fit_is_refused_in_the_plan(recipe: Path) -> None:
    edit("config.json", intermediate_size=64)(Path("base"))
    ran = run_hub("compose", recipe)
    assert ran.code == 1 and "Traceback" not in ran.err
    assert ran.err.count("error:") == 1


def test_a_file_that_was_changed_and_dated_back_is_read_again(recipe: Path) -> None:
    path = Path("base/model.safetensors")
    first, stat = bases.read(Path("base"), "x").fingerprint, path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = bases.read(Path("base"), "x").fingerprint
    assert second != first
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert bases.read(Path("base"), "x").fingerprint == second


def test_verify_hashes_a_base_in_the_users_folder(recipe: Path) -> None:
    known = bases.read(Path("base"), "x").fingerprint
    entry = {"sources": ["file:base"], "fingerprint": known}
    Path("registry.yaml").write_text(yaml_files.dump({"version": 1, "bases": {"own": entry}}))
    assert run_hub("verify").code == 0
    path = Path("base/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ran = run_hub("verify")
    assert ran.code == 3 and "own" in ran.err


def test_files_that_change_between_the_plan_and_loading_are_refused(recipe: Path) -> None:
    plan = hub.plan_of(recipe)
    for change in (swap_vocabulary, drop("model.norm.weight")):
        shutil.copytree("base", "kept")
        change(Path("base"))
        with pytest.raises(IntegrityError):
            hub.compose(plan)
        with pytest.raises(IntegrityError, match="were changed"):
            load_tokenizer(plan.base)
        shutil.rmtree("base")
        Path("kept").rename("base")


def tiny(folder: Path, kind: str, **settings: Any) -> Path:
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind[0]}Config")(**settings)
    getattr(transformers, kind[1])(config).save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "bert": (("Bert", "BertForSequenceClassification"), SMALL | {"vocab_size": 50}),
    "gpt2": (("GPT2", "GPT2LMHeadModel"), GPT2),
    "mixtral": (
        ("Mixtral", "MixtralForCausalLM"),
        SMALL | {"vocab_size": 50, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "qwen2": (
        ("Qwen2", "Qwen2ForCausalLM"),
        SMALL | {"vocab_size": 50, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "t5": (
        ("T5", "T5ForConditionalGeneration"),
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "vit": (
        ("ViT", "ViTForImageClassification"),
        SMALL | {"image_size": 16, "patch_size": 4, "num_labels": 3},
    ),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_base_is_loaded_as_transformers_alone_loads_it(
    name: str, sharded: bool, tmp_path: Path
) -> None:
    kind, settings = MODELS[name]
    folder = tiny(tmp_path / "base", kind, **settings)
    if sharded:
        model = getattr(transformers, kind[1]).from_pretrained(folder)
        shutil.rmtree(folder)
        model.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").is_file()
    base = bases.read(folder, "base")
    assert read_names(base).unused == ()
    for dtype in ("float32", "bfloat16"):
        ours = load_model(base, dtype, None)
        alone = getattr(transformers, kind[1]).from_pretrained(folder, dtype=dtype)
        own, expected = ours.state_dict(), alone.state_dict()
        assert own.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(own[key], tensor) and own[key].dtype == tensor.dtype, key
        buffers = dict(alone.named_buffers())
        for key, tensor in ours.named_buffers():
            assert torch.equal(tensor, buffers[key]), key
        assert ours.config.to_dict() == alone.config.to_dict()
        if alone.can_generate():
            assert ours.generation_config.to_dict() == alone.generation_config.to_dict()
        tied = {id(p) for p in ours.parameters()}
        assert len(tied) == len({id(p) for p in alone.parameters()})


def publish(api: HfApi, folder: Path, repository: str = "alice/b") -> str:
    files = [CommitOperationAdd(f.name, str(f)) for f in folder.iterdir() if f.is_file()]
    made = api.create_commit(repository, files, commit_message="a base")
    return str(made.oid)


@pytest.mark.parametrize("named", [False, True])
def test_a_lock_pins_the_commit_of_a_base(
    named: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HfServer(tmp_path / "server") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        api = HfApi(endpoint=server.url, token="hf_write")
        api.create_repo("alice/b")
        first = publish(api, Path("base"))
        content = yaml_files.read(recipe).value
        if named:
            Path("registry.yaml").write_text(
                "version: 1\nbases: {far: {sources: ['hf:alice/b']}}\n"
            )
        content["base"] = "far" if named else "hf:alice/b"
        recipe.write_text(yaml_files.dump(content))
        assert run_hub("lock", recipe).code == 0
        held = Lock.read(lock_path(recipe))
        assert held.base.commit == first
        edit("config.json", rms_norm_eps=0.5)(Path("base"))
        second = publish(api, Path("base"))
        assert second != first
        # Another machine has no copy of the base, and the branch has moved on.
        monkeypatch.setenv("HUB_HOME", str(tmp_path / "elsewhere"))
        ran = run_hub("compose", recipe, "--frozen", "--json")
        assert ran.code == 0, ran.err
        assert ran.json["plan"]["base"]["commit"] == first
        assert ran.json["plan"]["composition"] == held.composition
        assert run_hub("compose", recipe, "--locked").code == 6


def test_two_bases_of_the_same_weights_are_not_compared(recipe: Path, tiny_task: str) -> None:
    shutil.copytree("base", "other")
    edit("config.json", hidden_act="relu")(Path("other"))
    content = yaml_files.read(recipe).value
    content["base"] = "./other"
    Path("second.yaml").write_text(yaml_files.dump(content))
    ran = run_hub("eval", recipe, "second.yaml", "--tasks", tiny_task)
    assert ran.code == 2 and "different bases" in ran.err


@pytest.mark.parametrize("change", [swap_vocabulary, edit("config.json", rms_norm_eps=0.5)])
def test_a_fetched_base_that_was_changed_is_refused(
    change: Callable[[Path], None], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HfServer(tmp_path / "server") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        api = HfApi(endpoint=server.url, token="hf_write")
        api.create_repo("alice/b")
        publish(api, Path("base"))
        content = yaml_files.read(recipe).value
        recipe.write_text(yaml_files.dump(content | {"base": "hf:alice/b"}))
        assert run_hub("compose", recipe).code == 0
        (folder,) = Path(os.environ["HUB_HOME"]).glob("hf/alice--b/*-*")
        change(folder)
        ran = run_hub("compose", recipe)
        assert ran.code == 3 and "was changed since it was fetched" in ran.err
        assert run_hub("verify", "--repair").code == 0
        assert run_hub("compose", recipe).code == 0


def test_find_gives_the_digest(recipe: Path) -> None:
    found = find("./base", hub.Session())
    assert found.digest.startswith("sha256:") and found.digest != found.fingerprint
    with pytest.raises(HubError):
        find("./nowhere", hub.Session())


def test_a_tensor_in_two_shards_is_refused(recipe: Path) -> None:
    """The fingerprint does not name files, so exchanged names would exchange the weights."""
    name, state = "model.layers.0.self_attn.q_proj.weight", load_file("base/model.safetensors")
    save_file(state, "base/a.safetensors")
    save_file({name: state[name] + 1}, "base/b.safetensors")
    Path("base/model.safetensors").unlink()
    index = {"weight_map": {name: "a.safetensors", "other": "b.safetensors"}}
    Path("base/model.safetensors.index.json").write_text(json.dumps(index))
    ran = run_hub("compose", recipe)
    assert ran.code == 3 and f"{name} is in b.safetensors" in ran.err


def test_the_version_counts_where_transformers_reads_it(recipe: Path) -> None:
    def digest(version: str) -> str:
        edit("config.json", transformers_version=version)(Path("base"))
        return bases.read(Path("base"), "x").digest

    assert digest("4.50.0") == digest("5.1.0")
    edit("tokenizer_config.json", fix_mistral_regex=True)(Path("base"))
    assert digest("4.50.0") != digest("5.1.0")


def test_cached_scores_are_of_the_present_encoder(recipe: Path, tiny_task: str) -> None:
    tiny_bert(Path("encoder"))
    for number in (1, 2):
        words = ["--name", f"mine-{number}", "--task", tiny_task, "--base", "./base"]
        assert run_hub("add", f"expert-{number}", *words).code == 0
    route = {"method": "retrieval", "embedder": "./encoder", "examples": 4}
    content = {"base": "./base", "experts": ["mine-1", "mine-2"], "route": route}
    recipe.write_text(yaml_files.dump(content))
    assert run_hub("lock", recipe).code == 0
    words = ["eval", recipe, "--tasks", tiny_task, "--split", "test", "--json"]
    assert run_hub(*words).code == 0
    edit("config.json", layer_norm_eps=50.0)(Path("encoder"))
    ran = run_hub(*words, "--frozen")
    assert ran.code == 6 and "the encoder ./encoder" in ran.err
    assert run_hub(*words, "--no-cache").json["tasks"] == run_hub(*words).json["tasks"]


@pytest.mark.parametrize("named", [False, True])
def test_a_lock_pins_the_commit_of_an_encoder(
    named: bool,
    recipe: Path,
    tiny_task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_bert(Path("encoder"))
    for number in (1, 2):
        words = ["--name", f"mine-{number}", "--task", tiny_task, "--base", "./base"]
        assert run_hub("add", f"expert-{number}", *words).code == 0
    with HfServer(tmp_path / "server") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        api = HfApi(endpoint=server.url, token="hf_write")
        api.create_repo("alice/e")
        first = publish(api, Path("encoder"), "alice/e")
        name = "far" if named else "hf:alice/e"
        Path("registry.yaml").write_text("version: 1\nbases: {far: {sources: ['hf:alice/e']}}\n")
        route = {"method": "retrieval", "embedder": name, "examples": 4}
        content = {"base": "./base", "experts": ["mine-1", "mine-2"], "route": route}
        recipe.write_text(yaml_files.dump(content))
        assert run_hub("lock", recipe).code == 0
        held = Lock.read(lock_path(recipe)).encoders
        assert held is not None and held[name].commit == first
        words = ["eval", recipe, "--tasks", tiny_task, "--split", "test", "--json"]
        before = run_hub(*words, "--frozen")
        edit("config.json", layer_norm_eps=50.0)(Path("encoder"))
        assert publish(api, Path("encoder"), "alice/e") != first
        # Without the copy of the encoder, as on another machine.
        shutil.rmtree(Path(os.environ["HUB_HOME"], "hf"))
        Path("registry.yaml").unlink()
        after = run_hub(*words, "--frozen", "--no-cache")
        assert after.code == 0, after.err
        assert after.json["tasks"] == before.json["tasks"]
        (fetched,) = Path(os.environ["HUB_HOME"]).glob("hf/alice--e/*-*")
        assert hf.read_commit(fetched) == first


@pytest.mark.parametrize("key", ["prompt_lookup_num_tokens", "assistant_early_exit"])
def test_guessed_tokens_choose_no_expert(key: str, recipe: Path) -> None:
    """Transformers appends its guesses to the prompt, with these settings, before a router reads it."""
    content = {"base": "./base", "experts": ["./expert-1", "./expert-2"]}

    def written() -> list[str]:
        made = hub.compose({**content, "route": {"method": "smear"}})
        return [generate_text(made, "ab" * n + "a", max_new_tokens=8) for n in range(1, 7)]

    before = written()
    edit("generation_config.json", **{key: 3 if "lookup" in key else 1})(Path("base"))
    assert written() == before
