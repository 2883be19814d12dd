"""Every wrong input ends in a sentence, a hint and its exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_hub, snapshot, tiny_llama
from experthub.hub.registry.expert import Expert
from experthub.hub.store.folder import read_folder
from experthub.hub.store.store import Store
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import write_task
from experthub.hub.transfer.describe import write_description
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.attack
CACHES = ("home/fingerprints", "home/locks", "home/hf")
ADAPTER = "adapter_model.safetensors"
LINEAR = "merge: {method: linear}"


@dataclass(frozen=True)
class Place:
    """The surroundings of a case: an empty current folder, a base, and a maker of experts."""

    work: Path
    base: Path
    expert: Callable[..., Path]
    environment: pytest.MonkeyPatch

    def write(self, text: str, name: str = "recipe.yaml") -> Path:
        path = self.work / name
        path.write_text(text)
        return path

    def recipe(
        self, *experts: Path | str, way: str = LINEAR, more: str = "", base: Path | str = ""
    ) -> Path:
        """A recipe: base on line 1, experts on line 2, merge or route from line 3, then more."""
        return self.write(
            f"base: {base or self.base}\nexperts: [{', '.join(map(str, experts))}]\n{way}\n{more}\n"
        )

    def stored(self, seed: int = 1, **options: Any) -> Path:
        """A sound expert whose content is in the store already."""
        folder = self.expert(seed, **options)
        Store().add(folder)
        return folder

    def added(self, name: str, seed: int = 1, **options: Any) -> Path:
        """A sound expert under a name."""
        folder = self.expert(seed, **options)
        assert run_hub("add", folder, "--name", name).code == 0
        return folder


@pytest.fixture
def place(
    tmp_path: Path,
    base_folder: Path,
    expert_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Place(tmp_path / "work", base_folder, expert_folder, monkeypatch)


Words = list[str | Path]
Arrange = Callable[[Place], Words]


@dataclass(frozen=True)
class Case:
    code: int
    error: str
    hint: str
    arrange: Arrange


CASES: dict[str, Case] = {}


def case(code: int, error: str, hint: str = "") -> Callable[[Arrange], Arrange]:
    """Enter a case: the exit code, and what must be found in the error and in the hint.

    The function sets it up and returns the command's words.
    """

    def enter(arrange: Arrange) -> Arrange:
        CASES[arrange.__name__] = Case(code, error, hint, arrange)
        return arrange

    return enter


def check_refusal(place: Place, words: Words, code: int, error: str, hint: str) -> None:
    """Run the command; it must be refused as said, and change no file."""
    root = place.work.parent
    before = snapshot(root, *CACHES)
    ran = run_hub(*words)
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert len(ran.lines("error:")) == 1 and len(ran.lines("hint:")) == 1, ran.err
    assert re.search(error, ran.lines("error:")[0]), ran.err
    assert re.search(hint, ran.lines("hint:")[0]) and ran.lines("hint:")[0] != "hint: ", ran.err
    assert snapshot(root, *CACHES) == before


# Recipes


@case(2, r"recipe\.yaml, line 4: unknown key 'targest'", "did you mean 'targets'")
def unknown_recipe_key(place: Place) -> Words:
    return ["compose", place.recipe(place.stored(), more="targest: x")]


@case(2, "line 3: unknown key 'wieght'", "did you mean 'weight'")
def unknown_key_of_an_expert(place: Place) -> Words:
    text = f"base: {place.base}\nexperts:\n  - {{expert: ./x, wieght: 1}}\n{LINEAR}\n"
    return ["compose", place.write(text)]


@case(2, "line 5: unknown key 'scael'", "did you mean 'scale'")
def unknown_option_of_a_merge(place: Place) -> Words:
    way = "merge:\n  method: task_arithmetic\n  scael: 0.5"
    return ["compose", place.recipe("x", way=way)]


@case(2, "line 5: unknown key 'topk'", "did you mean 'top_k'")
def unknown_option_of_a_route(place: Place) -> Words:
    return ["compose", place.recipe("x", way="route:\n  method: phatgoose\n  topk: 1")]


@case(2, "line 5: unknown key 'scale'", "use method")
def unknown_option_of_a_nested_merge(place: Place) -> Words:
    nested = "\n  - experts: [x]\n    merge:\n      {method: linear, scale: 1}"
    return ["compose", place.write(f"base: b\nexperts:{nested}\n{LINEAR}\n")]


@case(2, "line 3: task_arithmetic: option 'scale': expected float, found 'much'", "hub methods")
def wrong_type_of_an_option(place: Place) -> Words:
    return ["compose", place.recipe("x", way="merge: {method: task_arithmetic, scale: much}")]


@case(2, "line 5: phatgoose: option 'top_k': expected >= 1, found 0", "hub methods phatgoose")
def option_out_of_range(place: Place) -> Words:
    return ["compose", place.recipe("x", way="route:\n  method: phatgoose\n  top_k: 0")]


@case(2, "option 'scale': expected from -10 to 10, found nan", "hub methods")
def option_that_is_no_number(place: Place) -> Words:
    return ["compose", place.recipe("x", way="merge: {method: task_arithmetic, scale: .nan}")]


@case(2, "line 4: expected outputs or parameters, found 'both'", "outputs")
def unknown_way_to_combine(place: Place) -> Words:
    return ["compose", place.recipe("x", way="route:\n  combine: both\n  method: uniform")]


@case(2, "line 4: unknown merge method 'liner'", "did you mean 'linear'")
def unknown_method(place: Place) -> Words:
    return ["compose", place.recipe("x", way="merge:\n  method: liner")]


@case(
    2,
    "line 3: unknown merge method 'phatgoose'",
    "write it under 'route:', because phatgoose is a route",
)
def router_under_merge(place: Place) -> Words:
    return ["compose", place.recipe("x", way="merge: {method: phatgoose}")]


@case(
    2, "line 3: unknown route method 'linear'", "write it under 'merge:', because linear is a merge"
)
def merge_under_route(place: Place) -> Words:
    return ["compose", place.recipe("x", way="route: {method: linear}")]


@case(2, "expected exactly one of merge, route and parts")
def neither_merge_nor_route(place: Place) -> Words:
    return ["compose", place.recipe("x", way="seed: 1")]


@case(2, "expected exactly one of merge, route and parts")
def both_merge_and_route(place: Place) -> Words:
    return ["compose", place.recipe("x", way=LINEAR, more="route: {method: uniform}")]


@case(2, "line 2: .*experts", "docs/recipes")
def no_experts(place: Place) -> Words:
    return ["compose", place.recipe()]


@case(2, "the key 'base' is missing")
def recipe_that_is_a_list(place: Place) -> Words:
    return ["compose", place.write("- 1\n- 2\n")]


@case(2, "line 4: seed: .*integer")
def wrong_type_of_a_key(place: Place) -> Words:
    return ["compose", place.recipe("x", more="seed: many")]


@case(2, "line 2: .*finite number")
def infinite_weight(place: Place) -> Words:
    return ["compose", place.recipe("{expert: x, weight: .inf}")]


@case(2, "line 4: targets: .* not a regular expression")
def broken_pattern(place: Place) -> Words:
    return ["compose", place.recipe("x", more="targets: '('")]


@case(2, "line 2: 'No Name' is not a reference", "name@2")
def broken_reference(place: Place) -> Words:
    return ["compose", place.recipe("No Name")]


@case(2, r"recipe\.yaml, line 3: ", "indentation")
def malformed_yaml(place: Place) -> Words:
    return ["compose", place.write("base: x\nexperts: [a, b\nmerge: {method: linear}\n")]


@case(2, "line 3: the key 'base' is set twice", "remove one")
def repeated_key(place: Place) -> Words:
    return ["compose", place.write("base: x\nexperts: [a]\nbase: y\n")]


@case(2, "line 3: aliases are not supported", "write the value out")
def yaml_alias(place: Place) -> Words:
    return ["compose", place.write("base: &b x\nexperts: [a]\nmerge: *b\n")]


@case(2, "line 4: merge keys are not supported", "write the keys out")
def yaml_merge_key(place: Place) -> Words:
    return ["compose", place.recipe("x", more="<<: {seed: 1}")]


@case(2, "line 2: the tag tag:yaml.org,2002:int", "without tags")
def yaml_tag(place: Place) -> Words:
    return ["compose", place.write("base: x\nseed: !!int '3'\nexperts: [a]\n")]


@case(2, "line 3: a second document starts here", "one document")
def yaml_documents(place: Place) -> Words:
    return ["compose", place.write("base: x\nexperts: [a]\n---\nbase: y\n")]


@case(2, "line 1: the key is not text", "key: value")
def yaml_key_of_a_list(place: Place) -> Words:
    return ["compose", place.write("[base]: x\nexperts: [a]\n")]


@case(2, "line 1: the values are nested deeper than 100 levels", "right file")
def yaml_nested_deeply(place: Place) -> Words:
    return ["compose", place.write("[" * 200_000)]


@case(2, "not text", "UTF-8")
def recipe_that_is_not_text(place: Place) -> Words:
    path = place.work / "recipe.yaml"
    path.write_bytes(b"base: \xff\xfe")
    return ["compose", path]


@case(2, "larger than", "recipe")
def recipe_that_is_huge(place: Place) -> Words:
    return ["compose", place.write("# " + "x" * (1 << 20))]


@case(4, "there is no recipe .*nothing.yaml")
def missing_recipe(place: Place) -> Words:
    return ["compose", "nothing.yaml"]


@case(2, "cannot use the device 'tpu9'")
def unknown_device(place: Place) -> Words:
    return ["compose", place.recipe(place.stored()), "--out", "out", "--device", "tpu9"]


@case(2, "unknown format 'gguf'", "hf or peft")
def unknown_format(place: Place) -> Words:
    return ["compose", place.recipe(place.stored()), "--out", "out", "--format", "gguf"]


@case(2, "linear: expected weights with a sum other than 0", "weights")
def weights_that_cancel(place: Place) -> Words:
    uses = [f"{{expert: {place.stored(seed)}, weight: {w}}}" for seed, w in ((1, 1), (2, -1))]
    return ["compose", place.recipe(*uses), "--out", "out"]


@case(2, "linear: expected weights with a sum other than 0", "weights")
def weights_that_cancel_in_a_nested_merge(place: Place) -> Words:
    uses = [f"{{expert: {place.stored(seed)}, weight: {w}}}" for seed, w in ((1, 1), (2, -1))]
    nested = f"{{{LINEAR}, experts: [{', '.join(uses)}]}}"
    return ["compose", place.recipe(nested), "--out", "out"]


@case(2, r"linear: expected a matrix or a stack of them, found shape \[32\]", "options")
def rank_for_a_vector(place: Place) -> Words:
    folder = place.work / "vector"
    folder.mkdir()
    save_file({"model.norm.weight": torch.ones(32)}, folder / "task_vector.safetensors")
    Store().add(folder)
    nested = f"{{{LINEAR}, experts: [{folder}], rank: 2}}"
    return ["compose", place.recipe(nested), "--out", "out"]


# Experts, bases and the registry


@case(4, "no registry has an expert named 'intents'", "did you mean 'intent'")
def unknown_expert(place: Place) -> Words:
    place.added("intent")
    return ["compose", place.recipe("intents")]


@case(4, "no registry has an expert named 'intents'", "did you mean 'intent'")
def unknown_expert_to_show(place: Place) -> Words:
    place.added("intent")
    return ["show", "intents"]


@case(4, "no registry has an expert named './x'")
def folder_where_a_name_is_meant(place: Place) -> Words:
    return ["show", "./x"]


@case(4, "no registry has intent@7", "use intent@1")
def unknown_version(place: Place) -> Words:
    place.added("intent")
    return ["pull", "intent@7"]


@case(1, "'twin@sha256:aaaaaaaa' matches several experts: twin@1, twin@2", "more digits")
def ambiguous_digest_prefix(place: Place) -> Words:
    entries = [
        f"  - {{name: twin, version: {v}, base: b, sources: ['file:x'], "
        f"digest: 'sha256:{'a' * 8}{v:056x}'}}\n"
        for v in (1, 2)
    ]
    place.write("version: 1\nexperts:\n" + "".join(entries), "registry.yaml")
    return ["show", "twin@sha256:aaaaaaaa"]


@case(2, r"registry\.yaml, line 3: unknown key 'descripton'", "did you mean 'description'")
def unknown_registry_key(place: Place) -> Words:
    place.write("version: 1\nexperts:\n  - {name: x, descripton: y}\n", "registry.yaml")
    return ["list"]


@case(4, "no registry has a base named 'tiny-llamma'", "did you mean 'tiny-llama'")
def unknown_base(place: Place) -> Words:
    place.write(
        f"version: 1\nbases:\n  tiny-llama: {{sources: ['file:{place.base}']}}\n", "registry.yaml"
    )
    return ["compose", place.recipe(place.stored(), base="tiny-llamma")]


@case(4, "there is no model folder .*/nowhere", "config.json")
def missing_base_folder(place: Place) -> Words:
    return ["compose", place.recipe(place.stored(), base="./nowhere")]


@case(3, "model.safetensors is damaged")
def damaged_base(place: Place) -> Words:
    folder = place.work / "base"
    tiny_llama(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return ["compose", place.recipe(place.stored(), base=folder)]


@case(3, "tiny: its weights are sha256:.* and the registry says sha256:000", "correct the sources")
def base_of_another_fingerprint(place: Place) -> Words:
    entry = f"{{sources: ['file:{place.base}'], fingerprint: 'sha256:{'0' * 64}'}}"
    place.write(f"version: 1\nbases:\n  tiny: {entry}\n", "registry.yaml")
    return ["compose", place.recipe(place.stored(), base="tiny")]


@case(3, "was made for the base sha256:00000", "allow_base_mismatch")
def expert_of_another_base(place: Place) -> Words:
    folder = place.expert(1)
    identity = read_folder(folder).model_copy(update={"base_fingerprint": "sha256:" + "0" * 64})
    expert = Expert(name="x", base="b", sources=["file:x"], digest=identity.digest)
    write_description(folder, expert, identity)
    Store().add(folder)
    return ["compose", place.recipe(folder)]


@case(1, r"changes .*\[32, 32\], but .* has \[48, 48\]", "trained on")
def shapes_that_do_not_fit(place: Place) -> Words:
    other = tiny_llama(place.work / "wide", hidden_size=48)
    return ["compose", place.recipe(place.stored(targets=("q_proj",)), base=other)]


@case(1, r"changes model.norm.weight \[31\], but .* has \[32\]", "trained on")
def task_vector_that_does_not_fit(place: Place) -> Words:
    folder = place.work / "vector"
    folder.mkdir()
    save_file({"model.norm.weight": torch.ones(31)}, folder / "task_vector.safetensors")
    Store().add(folder)
    return ["compose", place.recipe(folder)]


@case(1, "targets '.*nothing' matches no module", "that they change, such as model.layers")
def targets_that_match_nothing(place: Place) -> Words:
    return ["compose", place.recipe(place.stored(), more="targets: '.*nothing'")]


@case(1, "adapts model.layers.1.*, which .* does not have", "the base that the expert was")
def module_that_the_base_lacks(place: Place) -> Words:
    short = tiny_llama(place.work / "short", num_hidden_layers=1)
    return ["compose", place.recipe(place.stored(), base=short)]


@case(1, "expert bare@1 has no gate for model.layers.0.*, which phatgoose needs", "train gate bare")
def route_without_gates(place: Place) -> Words:
    folder = place.expert(1, gates=False)
    assert run_hub("add", folder, "--name", "bare", "--task", "local:t").code == 0
    return ["compose", place.recipe("bare", way="route: {method: phatgoose}")]


@case(2, "cannot be written as one", "hub generate")
def route_written_as_weights(place: Place) -> Words:
    way = "route: {method: phatgoose}"
    return ["compose", place.recipe(place.stored(), way=way), "--out", "out"]


@case(4, "there is no folder nowhere", "adapter")
def missing_folder(place: Place) -> Words:
    return ["add", "nowhere", "--name", "x"]


@case(4, "there is no folder .*recipe.yaml")
def file_where_a_folder_is_meant(place: Place) -> Words:
    return ["add", place.write(""), "--name", "x"]


@case(2, "'Big Name' is not a name", "a-z")
def name_that_is_none(place: Place) -> Words:
    return ["add", place.expert(1), "--name", "Big Name"]


@case(6, "x@1 is already registered as sha256:.*, but this content is sha256:", "--version 2")
def other_content_under_the_same_version(place: Place) -> Words:
    place.added("x")
    return ["add", place.stored(2), "--name", "x", "--version", "1"]


@case(4, "there is no registry nothing.yaml")
def missing_registry(place: Place) -> Words:
    return ["list", "--registry", "nothing.yaml"]


@case(3, "expected sha256:", "new version")
def source_that_changed(place: Place) -> Words:
    folder = place.expert(1)
    registry = place.work / "registry.yaml"
    assert run_hub("add", folder, "--name", "x", "--registry", registry).code == 0
    for path in (place.work.parent / "home" / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    other = place.expert(2)
    (folder / ADAPTER).write_bytes((other / ADAPTER).read_bytes())
    return ["pull", "x"]


@case(6, "out is in use", "name a new folder")
def out_folder_that_is_not_empty(place: Place) -> Words:
    (place.work / "out").mkdir()
    (place.work / "out" / "file").write_text("mine")
    return ["compose", place.recipe(place.stored()), "--out", "out"]


@case(6, "out is in use", "name a new folder")
def out_that_is_a_file(place: Place) -> Words:
    (place.work / "out").write_text("mine")
    return ["compose", place.recipe(place.stored()), "--out", "out"]


@case(1, "[Nn]ot a directory", "permissions")
def home_that_is_a_file(place: Place) -> Words:
    folder = place.expert(1)
    place.environment.setenv("HUB_HOME", str(place.write("", "home")))
    return ["add", folder, "--name", "x"]


# Remotes


def with_index(place: Place) -> None:
    """A base in a package of an index that does not answer."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    place.environment.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    source = "pypi:tiny-base==1.0#tiny/model.safetensors"
    place.write(f"version: 1\nbases:\n  tiny: {{sources: ['{source}']}}\n", "registry.yaml")


@case(1, "no answer from http://127.0.0.1", "network")
def index_that_does_not_answer(place: Place) -> Words:
    with_index(place)
    return ["pull", "tiny"]


@case(1, "HUB_OFFLINE is set", "unset HUB_OFFLINE")
def offline_base(place: Place) -> Words:
    with_index(place)
    place.environment.setenv("HUB_OFFLINE", "1")
    return ["pull", "tiny"]


@case(1, "HUB_OFFLINE is set", "unset HUB_OFFLINE")
def offline_base_of_a_recipe(place: Place) -> Words:
    place.environment.setenv("HUB_OFFLINE", "1")
    return ["compose", place.recipe(place.stored(), base="hf:someone/tiny")]


@case(1, "HUB_OFFLINE is set", "unset HUB_OFFLINE")
def offline_expert(place: Place) -> Words:
    place.environment.setenv("HUB_OFFLINE", "1")
    return ["compose", place.recipe("hf:someone/expert")]


@case(1, "cannot fetch s3://bucket/x", "file:PLACE or hf:")
def remote_that_is_not_known(place: Place) -> Words:
    return ["compose", place.recipe("s3://bucket/x")]


@case(2, "'pypi:tiny' is not a source", "pypi:package==version")
def broken_source(place: Place) -> Words:
    return ["compose", place.recipe(place.stored(), base="pypi:tiny")]


# Tasks


def task(place: Place, name: str = "t", **example: Any) -> str:
    """A task of twenty examples; its reference."""
    examples = []
    for number in range(20):
        fields = {"choices": ["yes", "no"], "answer": 0} | example
        fields = {key: value for key, value in fields.items() if value is not None}
        key = example_id(str(number), fields.get("choices", ()))
        examples.append(Example(id=key, input=str(number), **fields))
    kind = "choices" if examples[0].choices else "generation"
    return write_task("local", Card(name=name, source="made-up", kind=kind), examples)


@case(4, "there is no task local:paritty here", "did you mean 'local:parity'")
def unknown_task(place: Place) -> Words:
    task(place, "parity")
    return ["eval", place.recipe(place.stored()), "--tasks", "local:paritty"]


@case(4, "there is no task bigbench:nope", "hub tasks import bigbench nope")
def task_that_is_not_imported(place: Place) -> Words:
    return ["eval", place.recipe(place.stored()), "--tasks", "bigbench:nope"]


@case(4, "there is no task parity", "did you mean 'local:parity'")
def task_without_its_suite(place: Place) -> Words:
    task(place, "parity")
    return ["eval", place.recipe(place.stored()), "--tasks", "parity"]


@case(4, "nothing.txt does not exist")
def missing_list_of_tasks(place: Place) -> Words:
    return ["eval", place.recipe(place.stored()), "--tasks", "@nothing.txt"]


@case(2, "no tasks were given", "--tasks")
def no_task(place: Place) -> Words:
    return ["eval", place.recipe(place.stored())]


@case(2, "tasks.txt is not a text file in UTF-8", "one task per line")
def binary_list_of_tasks(place: Place) -> Words:
    (place.work / "tasks.txt").write_bytes(b"\xff\xfe\x00l")
    return ["eval", place.recipe(place.stored()), "--tasks", "@tasks.txt"]


def _folder(place: Place, name: str) -> Path:
    (place.work / name / "within").mkdir(parents=True)
    return place.work / name


@case(2, "taken is not a file", "name another file")
def result_in_place_of_a_folder(place: Place) -> Words:
    """Paths of outputs are checked before anything is read: the recipe does not exist."""
    return ["eval", "none.yaml", "--tasks", "local:t", "--out", _folder(place, "taken")]


@case(2, "taken is not a file", "name another file")
def samples_in_place_of_a_folder(place: Place) -> Words:
    return ["eval", "none.yaml", "--tasks", "local:t", "--samples", _folder(place, "taken")]


@case(2, r"table\.png: .*taken is not a folder", "name a file in a folder")
def plots_below_a_file(place: Place) -> Words:
    return ["eval", "none.yaml", "--tasks", "local:t", "--plots", place.write("", "taken")]


@case(2, "taken is not a file", "name another file")
def plot_in_place_of_a_folder(place: Place) -> Words:
    return ["coefficients", "none.yaml", "--plot", _folder(place, "taken")]


@case(6, "taken is in use", "name a new folder")
def model_in_place_of_a_folder(place: Place) -> Words:
    return ["compose", "none.yaml", "--out", _folder(place, "taken")]


@case(2, "smollm2-135m-instruct is a base, and --name is for experts", "remove --name")
def name_for_a_base(place: Place) -> Words:
    return ["pull", "smollm2-135m-instruct", "--name", "mine"]


@case(2, r"names of tasks are for bigbench, and \./folder is a folder", "remove snarks")
def names_of_tasks_in_a_folder(place: Place) -> Words:
    return ["tasks", "import", "./folder", "snarks"]


@case(2, "--suite is for folders, and not for bigbench", "remove --suite")
def suite_of_bigbench(place: Place) -> Words:
    return ["tasks", "import", "bigbench", "snarks", "--suite", "mine"]


@case(2, "linear is not a merge that learns coefficients", "hub methods")
def coefficients_of_a_plain_merge(place: Place) -> Words:
    return ["coefficients", place.recipe(place.stored())]


@case(2, "uniform is not a router with a state", "hub methods")
def state_of_a_plain_router(place: Place) -> Words:
    return ["router", place.recipe(place.stored(), way="route: {method: uniform}")]


@case(2, "unknown split 'dev'", "validation")
def unknown_split(place: Place) -> Words:
    return ["eval", place.recipe(place.stored()), "--tasks", task(place), "--split", "dev"]


@case(2, "e@1, an expert of recipe, was trained on local:t, and --split all", "--split test")
def all_of_a_trained_task(place: Place) -> Words:
    trained = task(place)
    assert run_hub("add", place.expert(1), "--name", "e", "--task", trained).code == 0
    return ["eval", place.recipe("e"), "--tasks", trained, "--split", "all"]


@case(2, "an expert of recipe, was trained on local:t, and --split all", "--split test")
def all_of_a_task_that_a_folder_was_trained_on(place: Place) -> Words:
    folder = place.expert(1)
    identity = read_folder(folder)
    write_description(
        folder,
        Expert(name="e", base="b", sources=["file:x"], digest=identity.digest, task=task(place)),
        identity,
    )
    Store().add(folder)
    return ["eval", place.recipe(folder), "--tasks", "local:t", "--split", "all"]


@case(2, "local:free has no choices to rank", "another task")
def task_without_choices(place: Place) -> Words:
    free = task(place, "free", choices=None, answer=None, targets=["a"])
    return ["eval", place.recipe(place.stored()), "--tasks", free]


def task_folder(place: Place, card: str = "name: t\nsource: s\n", lines: str = "") -> Path:
    """A task's folder as somebody might write it."""
    folder = place.work / "task"
    folder.mkdir()
    (folder / "card.yaml").write_text(card)
    (folder / "examples.jsonl").write_text(lines)
    return folder


@case(2, "has no choices to rank", "another task")
def task_without_choices_that_does_not_say_so(place: Place) -> Words:
    folder = task_folder(place, lines='{"id": "0", "input": "x", "targets": ["y"]}\n')
    return ["eval", place.recipe(place.stored()), "--tasks", folder, "--split", "train"]


@case(1, "task .* is empty: .* has no examples", "add examples")
def empty_task(place: Place) -> Words:
    return ["eval", place.recipe(place.stored()), "--tasks", task_folder(place)]


@case(1, "task .* has no test examples; it has 1 in all", "use another split")
def empty_split(place: Place) -> Words:
    line = '{"id": "0", "input": "x", "choices": ["a", "b"], "answer": 0}\n'
    return ["eval", place.recipe(place.stored()), "--tasks", task_folder(place, lines=line)]


@case(3, "examples.jsonl, line 1: .*the answer is 2, and the positions of the 2 choices are 0 to 1")
def answer_that_is_no_choice(place: Place) -> Words:
    line = '{"id": "0", "input": "x", "choices": ["a", "b"], "answer": 2}\n'
    return ["tasks", "import", task_folder(place, lines=line)]


@case(3, "examples.jsonl.* is not text")
def examples_that_are_not_text(place: Place) -> Words:
    folder = task_folder(place)
    (folder / "examples.jsonl").write_bytes(b"\xff\xfe\n")
    return ["tasks", "import", folder]


@case(2, "card.yaml, line 3: unknown key 'licence'", "did you mean 'license'")
def unknown_key_of_a_card(place: Place) -> Words:
    return ["tasks", "import", task_folder(place, "name: t\nsource: s\nlicence: mit\n")]


@case(2, "'../../../escaped' is not a name of a task", "docs/registry.md")
def task_name_that_leaves_the_folder(place: Place) -> Words:
    line = '{"id": "0", "input": "x", "choices": ["a", "b"], "answer": 0}\n'
    folder = task_folder(place, "name: ../../../escaped\nsource: s\n", line)
    return ["tasks", "import", folder]


@case(6, "local:t exists with other content", "remove")
def task_of_another_content(place: Place) -> Words:
    task(place)
    line = '{"id": "0", "input": "x", "choices": ["a", "b"], "answer": 0}\n'
    return ["tasks", "import", task_folder(place, lines=line)]


@case(4, "contains no card.yaml", "docs")
def folder_without_tasks(place: Place) -> Words:
    return ["tasks", "import", "."]


@case(1, "has no tokenizer.*composing works", "copy the files")
def text_from_a_base_without_a_tokenizer(place: Place) -> Words:
    bare = tiny_llama(place.work / "bare")
    for path in bare.glob("token*"):
        path.unlink()
    return ["generate", place.recipe(place.stored(), base=bare), "--prompt", "x"]


@case(1, "base .*broken.* transformers cannot load it", "check the files in")
def text_from_a_base_with_a_damaged_tokenizer(place: Place) -> Words:
    broken = tiny_llama(place.work / "broken")
    (broken / "tokenizer.json").write_text("{")
    return ["generate", place.recipe(place.stored(), base=broken), "--prompt", "x"]


@case(1, "base .*broken.* transformers cannot load it: data did not match", "check the files in")
def text_from_a_base_with_a_tokenizer_of_another_kind(place: Place) -> Words:
    broken = tiny_llama(place.work / "broken")
    other = {"version": "1.0", "added_tokens": [], "model": {"type": "X"}}
    (broken / "tokenizer.json").write_text(json.dumps(other))
    return ["generate", place.recipe(place.stored(), base=broken), "--prompt", "x"]


@case(2, "the prompt is empty", "--prompt")
def empty_prompt(place: Place) -> Words:
    return ["generate", place.recipe(place.stored()), "--prompt", ""]


@case(2, "has no chat template", "--chat")
def chat_without_a_template(place: Place) -> Words:
    return ["generate", place.recipe(place.stored()), "--prompt", "x", "--chat"]


@case(4, "unknown method 'phatgose'", "did you mean 'phatgoose'")
def unknown_method_to_show(place: Place) -> Words:
    return ["methods", "phatgose"]


# The command line itself


@case(2, "[Nn]o such command 'lst'", "hub --help")
def unknown_command(place: Place) -> Words:
    return ["lst"]


@case(2, "[Nn]o such option: --jsn", "hub list --help")
def unknown_flag(place: Place) -> Words:
    return ["list", "--jsn"]


@case(2, "[Mm]issing argument", "hub pull --help")
def missing_argument(place: Place) -> Words:
    return ["pull"]


@case(2, "'--max-new-tokens'", "hub generate --help")
def flag_out_of_range(place: Place) -> Words:
    return ["generate", place.recipe("x"), "--prompt", "x", "--max-new-tokens", "0"]


@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_sentence_and_a_hint(name: str, place: Place) -> None:
    chosen = CASES[name]
    check_refusal(place, chosen.arrange(place), chosen.code, chosen.error, chosen.hint)


# Folders that are no sound expert: exit 3, whether they are added or composed.

Spoil = Callable[[Place], Path]
UNSOUND: dict[str, tuple[str, Spoil]] = {}


def unsound(error: str) -> Callable[[Spoil], Spoil]:
    """Enter a folder that must be refused, and what the error must name."""

    def enter(spoil: Spoil) -> Spoil:
        UNSOUND[spoil.__name__] = (error, spoil)
        return spoil

    return enter


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora is True"),
    "lora_bias_that_is_a_word": ({"lora_bias": "yes"}, "lora_bias is 'yes'"),
    "modules_to_save_without_weights": (
        {"modules_to_save": ["lm_head"]},
        r"modules_to_save is \['lm_head'\], and the file holds no weights for it",
    ),
    "trainable_tokens_without_rows": (
        {"trainable_token_indices": [1]},
        r"trainable_token_indices is \[1\], and the file holds no weights for it",
    ),
    "trainable_tokens_without_rows_by_module": (
        {"trainable_token_indices": {"embed_tokens": [1]}},
        "trainable_token_indices is .*, and the file holds no weights for it",
    ),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "unknown_key": ({"lora_alhpa": 3}, "unknown key 'lora_alhpa'"),
    "other_method": ({"peft_type": "IA3"}, "unknown key 'r' of IA3"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    "rank_mismatch": ({"r": 8}, "A of rank 4 and B of rank 4, and its configuration says 8"),
    "not_targeted": ({"target_modules": ["q_proj"]}, "which its target_modules do not match"),
    "excluded": ({"exclude_modules": ["q_proj"]}, "q_proj, which its target_modules do not match"),
    "rank_that_is_no_number": ({"r": "4"}, "r is '4'"),
    "alpha_zero": ({"lora_alpha": 0}, "lora_alpha is 0"),
    "alpha_nan": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "rank_pattern_list": ({"rank_pattern": ["q_proj"]}, "rank_pattern is "),
    "alpha_pattern_nan": ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern is "),
    "alpha_pattern_word": ({"alpha_pattern": {"q_proj": "two"}}, "alpha_pattern is "),
    "broken_rank_pattern": ({"rank_pattern": {"(": 4}}, "rank_pattern is "),
    "broken_target": ({"target_modules": "("}, "target_modules is "),
    "target_number": ({"target_modules": 7}, "target_modules is 7"),
    "broken_layers_pattern": (
        {"layers_to_transform": [0, 1], "layers_pattern": "("},
        "layers_pattern is ",
    ),
    "layers_word": ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
    "rslora_word": ({"use_rslora": "no"}, "use_rslora is 'no'"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_refused_by_name(name: str, place: Place) -> None:
    changes, error = CONFIGURATIONS[name]
    check_refusal(place, ["add", place.expert(1, **changes), "--name", "x"], 3, error, "")


def refuse_folder(place: Place, folder: Path, error: str, code: int = 3) -> None:
    check_refusal(place, ["add", folder, "--name", "x"], code, error, "")
    check_refusal(place, ["compose", place.recipe(folder), "--out", "out"], code, error, "")


def changed_bytes(place: Place, change: Callable[[bytes], bytes]) -> Path:
    folder = place.expert(1)
    path = folder / ADAPTER
    path.write_bytes(change(path.read_bytes()))
    return folder


@unsound("is damaged")
def cut_short(place: Place) -> Path:
    return changed_bytes(place, lambda content: content[:-10])


@unsound("is damaged")
def trailing_bytes(place: Place) -> Path:
    return changed_bytes(place, lambda content: content + b"\0" * 8)


@unsound("is damaged")
def flipped_header(place: Place) -> Path:
    return changed_bytes(place, lambda content: content[:9] + b"\0" + content[10:])


@unsound("is damaged: header of 0 bytes")
def empty_file(place: Place) -> Path:
    return changed_bytes(place, lambda content: b"")


@unsound("is damaged")
def lfs_pointer(place: Place) -> Path:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    return changed_bytes(place, lambda content: pointer)


@unsound("is damaged")
def deep_header(place: Place) -> Path:
    header = b"[" * 200_000
    return changed_bytes(place, lambda _: len(header).to_bytes(8, "little") + header)


@unsound("adapter_model.bin, a pickle, and no safetensors")
def only_a_pickle(place: Place) -> Path:
    folder = place.expert(1)
    torch.save(load_file(folder / ADAPTER), folder / "adapter_model.bin")
    (folder / ADAPTER).unlink()
    return folder


@unsound("is a pickle, not safetensors")
def renamed_pickle(place: Place) -> Path:
    return changed_bytes(place, lambda content: pickle.dumps({"a": 1}, protocol=4))


@unsound("is a pickle, not safetensors")
def renamed_torch_file(place: Place) -> Path:
    folder = place.expert(1)
    torch.save({"a": torch.ones(2)}, folder / ADAPTER)
    return folder


@unsound("holds NaN or infinity")
def nan_weights(place: Place) -> Path:
    return spoiled_tensor(place, ADAPTER, "nan")


@unsound("holds NaN or infinity")
def infinite_weights(place: Place) -> Path:
    return spoiled_tensor(place, ADAPTER, "-inf")


@unsound("holds NaN or infinity")
def nan_gate(place: Place) -> Path:
    return spoiled_tensor(place, "phatgoose_gates.safetensors", "nan")


def spoiled_tensor(place: Place, name: str, value: str) -> Path:
    folder = place.expert(1)
    tensors = load_file(folder / name)
    tensors[max(tensors)].view(-1)[-1] = float(value)
    save_file(tensors, folder / name)
    return folder


def changed_tensors(place: Place, **changes: torch.Tensor | None) -> Path:
    """An expert with tensors of layer 0's q_proj replaced, added or (None) left out."""
    folder = place.expert(1)
    tensors = load_file(folder / ADAPTER)
    for name, value in changes.items():
        key = f"base_model.model.model.layers.0.self_attn.q_proj.{name.replace('__', '.')}"
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, folder / ADAPTER)
    return folder


@unsound(r"module .*q_proj has lora_A alone")
def missing_partner(place: Place) -> Path:
    return changed_tensors(place, lora_B__weight=None)


@unsound("magnitude_vector.* is not a part of a plain LoRA")
def hidden_dora(place: Place) -> Path:
    return changed_tensors(place, lora_magnitude_vector=torch.ones(32))


@unsound("lora_A.weight is I64")
def integer_weights(place: Place) -> Path:
    return changed_tensors(place, lora_A__weight=torch.ones(4, 32, dtype=torch.int64))


@unsound("holds no LoRA weights")
def no_weights(place: Place) -> Path:
    folder = place.expert(1)
    save_file({}, folder / ADAPTER)
    return folder


@unsound("is not a gate")
def gate_that_is_none(place: Place) -> Path:
    folder = place.expert(1)
    save_file({"x": torch.ones(3)}, folder / "phatgoose_gates.safetensors")
    return folder


@unsound("has no adapter_config.json")
def no_configuration(place: Place) -> Path:
    folder = place.expert(1)
    (folder / "adapter_config.json").unlink()
    return folder


@unsound("adapter_config.json is damaged")
def configuration_that_is_no_json(place: Place) -> Path:
    folder = place.expert(1)
    (folder / "adapter_config.json").write_text("{")
    return folder


@unsound("holds no adapter_model.safetensors")
def empty_folder(place: Place) -> Path:
    folder = place.work / "empty"
    folder.mkdir()
    return folder


def described(place: Place, **changes: Any) -> Path:
    """An expert with an expert.json, some fields of which are changed."""
    folder = place.expert(1)
    identity = read_folder(folder)
    expert = Expert(name="e", base="b", sources=["file:x"], digest=identity.digest)
    write_description(folder, expert, identity)
    path = folder / "expert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@unsound("no valid identity")
def description_without_identity(place: Place) -> Path:
    return described(place, identity=None)


@unsound("the files differ from those that its expert.json lists")
def description_of_other_files(place: Place) -> Path:
    folder = described(place)
    other = place.expert(2)
    (folder / ADAPTER).write_bytes((other / ADAPTER).read_bytes())
    return folder


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_folder_refused(name: str, place: Place) -> None:
    error, spoil = UNSOUND[name]
    refuse_folder(place, spoil(place), error)


@pytest.mark.parametrize(
    ("gate", "error"),
    [
        ({"model.elsewhere": 32}, "for model.elsewhere, which is not adapted"),
        ({"model.layers.0.mlp.down_proj": 32}, r"a gate \[32\] for .*, which has 48 inputs"),
    ],
)
def test_gates_that_do_not_fit(gate: dict[str, int], error: str, place: Place) -> None:
    folder = place.expert(1)
    tensors = {f"{module}.gate": torch.ones(width) for module, width in gate.items()}
    save_file(tensors, folder / "phatgoose_gates.safetensors")
    refuse_folder(place, folder, error, code=1)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"version": "two"}, "version"),
        ({"license": 5}, "license"),
        ({"scores": [{"task": "t"}]}, "scores"),
    ],
)
def test_description_with_wrong_fields(changes: dict[str, Any], error: str, place: Place) -> None:
    folder = described(place, **changes)
    Store().add(folder)
    check_refusal(place, ["add", folder, "--name", "e"], 3, f"expert.json: .*{error}", "")


def test_debugging_shows_where_an_error_arose(monkeypatch: pytest.MonkeyPatch) -> None:
    from experthub.hub.errors import NotFoundError

    monkeypatch.setenv("HUB_DEBUG", "1")
    with pytest.raises(NotFoundError, match="nothing"):
        run_hub("show", "nothing")
