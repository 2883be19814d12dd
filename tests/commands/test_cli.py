"""The command line: data on standard output, messages on standard error, JSON for programs."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from conftest import logits, run_hub, snapshot
from experthub import hub
from experthub.cli._output import print_table
from experthub.cli.main import app
from experthub.hub.registry.registry import Registry
from safetensors.torch import load_file, save_file

Make = Callable[..., Path]
EXPERT_KEYS = {
    "name",
    "version",
    "kind",
    "base",
    "sources",
    "digest",
    "task",
    "license",
    "description",
    "tags",
    "training",
    "scores",
}
RANDOM = 'version: 1\nexperts:\n  - {name: far, base: b, sources: ["file:x"], digest: "sha256:'


@pytest.fixture
def two(expert_folder: Make) -> list[Path]:
    """Two experts, added as `one` and `two`."""
    folders = [expert_folder(1), expert_folder(2, rank=2)]
    for folder, name in zip(folders, ("one", "two"), strict=True):
        assert run_hub("add", folder, "--name", name, "--description", f"the {name}").code == 0
    return folders


def recipe(name: str, base: Path, way: str, *experts: str) -> Path:
    path = Path(f"{name}.yaml")
    path.write_text(f"base: {base}\nexperts: [{', '.join(experts)}]\n{way}\n")
    return path


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


COMMANDS = list(commands(typer.main.get_command(app)))
LEAVES = [w for w in COMMANDS if w not in ((), ("train",), ("tasks",), ("base",))]


def test_every_group_of_commands_is_known() -> None:
    known = {" ".join(words) for words in LEAVES}
    assert known >= {
        *("list", "show", "add", "pull", "methods", "compose", "generate", "eval"),
        *("train lora", "train gate", "tasks list", "tasks import"),
        *("base add", "base list", "base show", "base rm", "convert"),
    }


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help(words: tuple[str, ...]) -> None:
    ran = run_hub(*words, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: {' '.join(['hub', *words])} ")
    if words in LEAVES:
        example = ran.out.split("Examples: ")[1]
        assert example.startswith(f"hub {' '.join(words)}"), "an example of this very command"


def test_no_words_show_the_help() -> None:
    ran = run_hub()
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("Usage: hub ") and "compose" in ran.err


def test_version() -> None:
    from importlib.metadata import version

    assert run_hub("--version").out == f"experthub {version('experthub')}\n"


# list, show, methods


def test_list(two: list[Path]) -> None:
    ran = run_hub("list")
    assert (ran.code, ran.err) == (0, "")
    rows = {line.split()[0]: line for line in ran.out.splitlines()}
    assert "the one" in rows["one@1"] and "lora" in rows["one@1"] and " yes " in rows["one@1"]
    quiet = run_hub("list", "--quiet").out.splitlines()
    assert {"one@1", "two@1"} <= set(quiet)
    assert quiet == sorted(quiet, key=lambda reference: reference.split("@"))


def test_list_as_json(two: list[Path]) -> None:
    Path("registry.yaml").write_text(RANDOM + "0" * 64 + '"}\n')
    document = run_hub("list", "--json").json
    assert set(document) == {"schema", "experts"} and document["schema"] == 1
    for expert in document["experts"]:
        # An expert that was added here was compared with peft, because its base is here.
        proof = {"proof"} if expert["name"] in ("one", "two") else set()
        assert set(expert) == EXPERT_KEYS | {"in_store"} | proof
    found = {e["name"]: e for e in document["experts"]}
    assert found["one"]["in_store"] and not found["far"]["in_store"]
    assert found["one"]["version"] == 1 and found["one"]["kind"] == "lora"
    assert found["two"]["sources"] == [f"file:{two[1]}"]


def test_list_of_bases(base_folder: Path) -> None:
    Path("registry.yaml").write_text(
        f"version: 1\nbases:\n  tiny: {{sources: ['file:{base_folder}'], license: mit}}\n"
    )
    assert "tiny" in run_hub("list", "--bases", "-q").out.splitlines()
    assert "mit" in run_hub("list", "--bases").out
    document = run_hub("list", "--bases", "--json").json
    assert set(document) == {"schema", "bases"} and document["schema"] == 1
    tiny = next(b for b in document["bases"] if b["name"] == "tiny")
    assert tiny["sources"] == [f"file:{base_folder}"]
    assert set(tiny) == {"name", "sources", "sha256", "fingerprint", "aka", "license", "terms"}
    shipped = {base["name"]: base for base in document["bases"]}
    assert shipped["gemma-3-270m"]["terms"] and not shipped["smollm2-135m-instruct"]["terms"]


def test_tables_print_words_as_they_are(expert_folder: Make) -> None:
    """Tables show no markup and no emoji, and cut nothing off without a terminal."""
    odd = "uses [/INST] and [bold]tags[/bold] :smile: " + "long " * 60 + "end"
    assert run_hub("add", expert_folder(1), "--name", "odd", "--description", odd).code == 0
    ran = run_hub("list")
    assert ran.code == 0 and odd in ran.out


def test_show(two: list[Path]) -> None:
    ran = run_hub("show", "one")
    assert (ran.code, ran.err) == (0, "")
    fields = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert fields["name"] == "one" and fields["version"] == "1" and fields["in_store"] == "yes"
    record = run_hub("show", "one@1", "--json").json
    assert set(record) == {"schema", "expert"} and set(record["expert"]) == EXPERT_KEYS | {
        *("in_store", "proof"),
    }
    proof = record["expert"]["proof"]
    assert proof["against"].startswith("peft ") and proof["dtype"] == "float32"
    assert 0 <= proof["max_difference"] < 1e-4
    assert str(proof["max_difference"]) in fields["proof"]
    digest = record["expert"]["digest"]
    assert run_hub("show", f"one@{digest[:15]}", "--json").json == record
    assert fields["digest"] == digest


def test_show_a_name_of_a_base_and_an_expert(two: list[Path], base_folder: Path) -> None:
    assert run_hub("base", "add", "one", base_folder).code == 0
    ran = run_hub("show", "one")
    assert "architecture" in ran.out
    assert ran.lines("note:") == ["note: one is also an expert; run hub show one@1"]


def test_names_are_not_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    rows = [["question-types-minilm@1", "lora", "x" * 90, "a description of many words " * 3]]
    print_table(["expert", "kind", "trained on", "description"], rows)
    assert isinstance(sys.stdout, Terminal)
    assert "question-types-minilm@1" in sys.stdout.getvalue()


def test_show_with_scores() -> None:
    score = (
        "{task: 'bigbench:x', split: test, metric: accuracy, n: 104, base: 0.41, expert: 0.8765}"
    )
    Path("registry.yaml").write_text(RANDOM + "0" * 64 + f'", scores: [{score}]}}\n')
    line = run_hub("show", "far").out.splitlines()[-1]
    assert line.split() == ["bigbench:x", "test", "104", "0.410", "0.876"]


def test_show_a_base() -> None:
    ran = run_hub("show", "smollm2-135m-instruct", "--json")
    assert ran.json["schema"] == 1 and ran.json["base"]["name"] == "smollm2-135m-instruct"
    assert "apache-2.0" in run_hub("show", "smollm2-135m-instruct").out


def test_methods() -> None:
    document = run_hub("methods", "--json").json
    assert set(document) == {"schema", "methods"} and document["schema"] == 1
    found = {m["name"]: m for m in document["methods"]}
    for method in found.values():
        extra = {"routing"} if method["kind"] == "route" else set()
        assert set(method) == {"name", "kind", "paper", "options", "needs"} | extra
        assert method["kind"] in ("merge", "route")
        assert method["paper"].startswith("https://")
    assert found["phatgoose"]["kind"] == "route" and found["phatgoose"]["needs"] == ["gates"]
    assert found["phatgoose"]["options"]["top_k"]["default"] == 2
    assert found["phatgoose"]["options"]["top_k"]["range"] == ">= 1"
    assert found["linear"]["kind"] == "merge" and found["linear"]["options"] == {}
    assert found["task_arithmetic"]["options"]["scale"]["default"] == 0.3
    assert set(run_hub("methods", "-q").out.split()) == set(found)
    table = run_hub("methods").out
    assert all(name in table for name in found)


def test_one_method() -> None:
    assert [m["name"] for m in run_hub("methods", "uniform", "--json").json["methods"]] == [
        "uniform"
    ]
    text = run_hub("methods", "phatgoose").out
    for part in ("phatgoose (route)", "paper: https://", "needs: gates", "top_k", "int"):
        assert part in text


# add, pull


def test_add_and_pull(two: list[Path], base_folder: Path) -> None:
    shown = run_hub("show", "one", "--json").json["expert"]
    ran = run_hub("pull", "one", "two@1")
    assert ran.code == 0
    assert ran.out.splitlines()[0] == f"one@1  {shown['digest']}"
    document = run_hub("pull", "one", "--json").json
    assert document == {"schema": 1, "pulled": [{"name": "one@1", "digest": shown["digest"]}]}
    Path("registry.yaml").write_text(
        f"version: 1\nbases:\n  tiny: {{sources: ['file:{base_folder}']}}\n"
    )
    pulled = run_hub("pull", "tiny", "one", "--json").json["pulled"]
    assert [p["name"] for p in pulled] == ["tiny", "one@1"]
    assert pulled[0]["digest"].startswith("sha256:")


def test_add_says_what_it_made(expert_folder: Make) -> None:
    folder = expert_folder(1)
    words = ["--base", "tiny", "--task", "local:t", "--description", "mine", "--version", "4"]
    document = run_hub("add", folder, "--name", "new", *words, "--json").json
    assert document["schema"] == 1
    expert = document["expert"]
    assert (expert["name"], expert["version"], expert["base"]) == ("new", 4, "tiny")
    assert (expert["task"], expert["description"]) == ("local:t", "mine")
    assert expert["in_store"]


# compose, generate


PLAN_KEYS = {"digest", "version", "base", "experts", "targets", "dtype", "seed", "parameters"}


def test_compose_without_out_is_a_plan(two: list[Path], base_folder: Path) -> None:
    path = recipe("mean", base_folder, "merge: {method: linear}", "one", "{expert: two, weight: 3}")
    work = snapshot(Path.cwd())
    ran = run_hub("compose", path)
    assert ran.code == 0
    for part in ("linear", "one@1", "two@1", "float32", "sha256:", "weights in"):
        assert part in ran.out
    document = run_hub("compose", path, "--json").json
    assert set(document) == {"schema", "plan"} and document["schema"] == 1
    plan = document["plan"]
    assert set(plan) >= PLAN_KEYS | {"merge"}
    assert plan["merge"] == {"method": "linear"}
    assert [e["weight"] for e in plan["experts"]] == [1.0, 3.0]
    assert {"expert", "digest", "as", "weight"} <= set(plan["experts"][0])
    assert plan["base"]["fingerprint"].startswith("sha256:")
    assert len(plan["parameters"]) == 14
    assert run_hub("compose", path, "--plan", "--out", "out", "--json").json == document
    assert snapshot(Path.cwd()) == work, "a plan writes nothing"


def test_the_plans_digest_pins_the_content(two: list[Path], base_folder: Path) -> None:
    def digest(way: str, *experts: str) -> str:
        path = recipe("r", base_folder, way, *experts)
        return str(run_hub("compose", path, "--json").json["plan"]["digest"])

    one = digest("merge: {method: linear}", "one")
    assert digest("merge: {method: linear}", "one@1") == one
    others = [
        digest("merge: {method: linear}", "two"),
        digest("merge: {method: linear}", "{expert: one, weight: 2}"),
        digest("merge: {method: task_arithmetic}", "one"),
        digest("merge: {method: task_arithmetic, scale: 0.5}", "one"),
        digest("route: {method: uniform}", "one"),
        digest("route: {method: uniform, combine: parameters}", "one"),
    ]
    assert len({one, *others}) == 7


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_compose_writes_a_model(form: str, two: list[Path], base_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = recipe("mean", base_folder, "merge: {method: linear}", "one", "two")
    ran = run_hub("compose", path, "--out", "out", "--format", form, "--json")
    assert ran.code == 0
    assert ran.json["out"] == "out" and "plan" in ran.json
    if form == "hf":
        written = AutoModelForCausalLM.from_pretrained("out")
    else:
        written = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_folder), "out"
        )
    expected = logits(hub.compose(path).model)
    assert abs(logits(written) - expected).max() < 1e-3
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["mean.yaml", "out"]


def test_generate(two: list[Path], base_folder: Path) -> None:
    path = recipe("route", base_folder, "route: {method: phatgoose}", "one", "two")
    words = ["generate", path, "--prompt", "ab", "--max-new-tokens", "6"]
    ran = run_hub(*words)
    assert ran.code == 0
    document = run_hub(*words, "--json").json
    assert set(document) == {"schema", "prompt", "text", "recipe"} and document["schema"] == 1
    assert ran.out == document["text"] + "\n"
    plan = run_hub("compose", path, "--json").json["plan"]
    assert (document["prompt"], document["recipe"]) == ("ab", plan["digest"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ids = tokenizer("ab", return_tensors="pt").input_ids
    for _ in range(6):  # greedy, by hand
        step = logits(hub.compose(path).model, ids.tolist())[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], 1)
        if int(step) == tokenizer.eos_token_id:
            break
    assert document["text"] == tokenizer.decode(ids[0, 2:], skip_special_tokens=True)


def test_sampling_repeats_with_the_recipes_seed(two: list[Path], base_folder: Path) -> None:
    def sample(seed: int) -> str:
        path = recipe("r", base_folder, f"merge: {{method: linear}}\nseed: {seed}", "one")
        words = ["--prompt", "ab", "--temperature", "5", "--max-new-tokens", "20"]
        return run_hub("generate", path, *words).out

    assert sample(1) == sample(1) != sample(2)


# eval, tasks


INTERVAL = [float, float]
SCORES = {
    "accuracy": float,
    "ci95": INTERVAL,
    "logprob": float,
    "delta_to_base": {"value": float, "ci95": INTERVAL},
}
RESULT = {
    "schema": int,
    "tasks": [
        {
            "task": str,
            "digest": str,
            "split": str,
            "n": int,
            "metric": str,
            "methods": {"base": SCORES, "mean": SCORES, "routed": SCORES},
        }
    ],
    "average": {"base": SCORES, "mean": SCORES, "routed": SCORES},
    "recipes": {
        "mean": {"digest": str, "path": str},
        "routed": {"digest": str, "path": str},
    },
    "comparisons": [{"recipe": str, "than": str, "value": float, "ci95": INTERVAL}],
    "protocol": {"score": str, "template": str, "shots": int, "seed": int},
    "environment": {"torch": str, "transformers": str, "experthub": str},
}


def check_shape(value: Any, shape: Any, where: str = "") -> None:
    """The same keys, and values of the same types, all the way down."""
    if isinstance(shape, dict):
        assert isinstance(value, dict) and set(value) == set(shape), where
        for key in shape:
            check_shape(value[key], shape[key], f"{where}.{key}")
    elif isinstance(shape, list):
        shapes = shape if len(shape) > 1 else shape * len(value)
        assert isinstance(value, list) and value and len(value) == len(shapes), where
        for index, (item, inner) in enumerate(zip(value, shapes, strict=True)):
            check_shape(item, inner, f"{where}[{index}]")
    else:
        assert type(value) is shape, f"{where}: {value!r}"


@pytest.fixture
def recipes(two: list[Path], base_folder: Path) -> list[Path]:
    return [
        recipe("mean", base_folder, "merge: {method: linear}", "one", "two"),
        recipe("routed", base_folder, "route: {method: phatgoose}", "one", "two"),
    ]


def test_eval_as_json(recipes: list[Path], tiny_task: str) -> None:
    words = ["eval", *recipes, "--tasks", tiny_task, "--limit", "6", "--seed", "3"]
    ran = run_hub(*words, "--json", "--out", "results/all.json")
    assert ran.code == 0, ran.err
    assert "wrote results/all.json" in ran.err
    check_shape(ran.json, RESULT)
    assert json.loads(Path("results/all.json").read_text()) == ran.json
    task = ran.json["tasks"][0]
    assert (task["task"], task["split"], task["n"]) == (tiny_task, "test", 6)
    assert task["metric"] == "accuracy" and task["digest"].startswith("sha256:")
    assert task["methods"]["base"]["delta_to_base"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    for scores in task["methods"].values():
        low, high = scores["ci95"]
        assert 0 <= low <= scores["accuracy"] <= high <= 1 and scores["logprob"] < 0
    assert ran.json["recipes"]["mean"]["path"] == "mean.yaml"
    plan = run_hub("compose", recipes[0], "--json").json["plan"]
    assert ran.json["recipes"]["mean"]["digest"] == plan["digest"]
    assert ran.json["protocol"]["score"] == "mean-token-logprob"
    assert (ran.json["protocol"]["shots"], ran.json["protocol"]["seed"]) == (0, 3)


def test_eval_as_a_table(recipes: list[Path], tiny_task: str) -> None:
    ran = run_hub("eval", *recipes, "--tasks", tiny_task, "--limit", "4")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].split() == ["task", "n", "base", "mean", "routed"]
    assert lines[1].split()[:2] == [tiny_task, "4"]
    assert lines[2].split()[0] == "average"
    assert "test split" in ran.out
    assert "loading the base" in ran.err and "loading the base" not in ran.out


def test_eval_says_in_words_what_it_shows() -> None:
    from experthub.cli.evaluate import explain_result

    def scores(value: float, low: float, high: float) -> dict[str, Any]:
        return {"delta_to_base": {"value": value, "ci95": [low, high]}}

    tasks = [{"methods": {"a": scores(0.1, 0.02, 0.2)}}, {"methods": {"a": scores(-0.1, -0.2, 0)}}]
    pair = {"recipe": "a", "than": "b", "value": -0.03, "ci95": [-0.05, -0.01]}
    result = {
        "recipes": {"a": {}},
        "tasks": tasks,
        "average": {"a": scores(0.0, -0.1, 0.1)},
        "comparisons": [pair],
        "controls": {"best_individual": "x@1"},
    }
    assert explain_result(result) == [
        "a: not clearly different from the base (+0.000, 95 % interval -0.100..+0.100) on average; "
        "clearly better on 1 and clearly worse on 0 of 2 tasks",
        "a: worse than b (-0.030, 95 % interval -0.050..-0.010) on average",
        "best_individual is the expert x@1",
    ]


def test_eval_with_controls_samples_and_pictures(recipes: list[Path], tiny_task: str) -> None:
    words = ["eval", *recipes, "-t", tiny_task, "--limit", "5", "--controls", "--score", "byte"]
    ran = run_hub(*words, "--samples", "out/samples.jsonl", "--plots", "pictures", "--json")
    assert ran.code == 0, ran.err
    columns = {"base", "mean", "routed", "merged", "best_individual", "oracle"}
    assert set(ran.json["average"]) == columns
    assert ran.json["protocol"]["score"] == "mean-byte-logprob"
    assert "samples" not in ran.json
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 5 * len(columns)
    assert set(rows[0]) == {"task", "id", "method", "scores", "answer", "right"}
    for row in rows:
        best = max(range(len(row["scores"])), key=row["scores"].__getitem__)
        assert row["right"] == (best == row["answer"])
    pictures = {path.name: path.read_bytes() for path in Path("pictures").iterdir()}
    assert set(pictures) == {"table.png", "routed-routing.png"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in pictures.values())
    assert run_hub(*words, "--json").json == ran.json


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--score", "median"], 2, "unknown score 'median'"),
        (["--split", "dev"], 2, "unknown split 'dev'"),
    ],
)
def test_eval_options_that_mean_nothing(
    words: list[str], code: int, said: str, recipes: list[Path], tiny_task: str
) -> None:
    ran = run_hub("eval", recipes[0], "-t", tiny_task, *words)
    assert (ran.code, ran.out) == (code, "") and said in ran.err


def test_a_control_cannot_share_its_name_with_a_recipe(
    two: list[Path], base_folder: Path, tiny_task: str
) -> None:
    path = recipe("oracle", base_folder, "merge: {method: linear}", "one", "two")
    ran = run_hub("eval", path, "-t", tiny_task, "--controls")
    assert ran.code == 2 and "oracle is the name of a control" in ran.err


def test_ways_to_name_tasks(recipes: list[Path], tiny_task: str, tmp_path: Path) -> None:
    """Repeated, by commas, left over on the command line, from a file, and a folder."""
    folder = tmp_path / "home" / "tasks" / "local" / "parity"
    run_hub("tasks", "import", folder, "--suite", "other")
    Path("tasks.txt").write_text(f"{tiny_task}\n\nother:parity\n")
    both = [tiny_task, "other:parity"]
    for words in (
        ["--tasks", tiny_task, "-t", "other:parity"],
        ["--tasks", f"{tiny_task},other:parity"],
        ["--tasks", tiny_task, "other:parity"],
        ["--tasks", "@tasks.txt"],
    ):
        ran = run_hub("eval", recipes[0], *words, "--limit", "2", "--json")
        assert ran.code == 0, ran.err
        assert [t["task"] for t in ran.json["tasks"]] == both
        assert ran.json["average"]["mean"]["delta_to_base"]["ci95"]
    ran = run_hub("eval", recipes[0], "--tasks", folder, "--split", "train", "--json")
    assert (ran.json["tasks"][0]["task"], ran.json["tasks"][0]["split"]) == (str(folder), "train")


def test_tasks(tiny_task: str) -> None:
    assert run_hub("tasks", "list", "-q").out == "local:parity\n"
    table = run_hub("tasks", "list").out.splitlines()
    assert table[1].split()[:4] == ["local:parity", "choices", "120", "made-up"]
    document = run_hub("tasks", "list", "--json").json
    assert document["schema"] == 1
    (task,) = document["tasks"]
    assert (task["task"], task["n"], task["kind"]) == ("local:parity", 120, "choices")
    assert {"digest", "source", "license", "category", "metric", "template"} <= set(task)


def test_no_tasks() -> None:
    ran = run_hub("tasks", "list")
    assert ran.code == 0 and "hub tasks import" in ran.err
    assert run_hub("tasks", "list", "--json").json == {"schema": 1, "tasks": []}


def task_folder(folder: Path, name: str, answer: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "card.yaml").write_text(f"name: {name}\nsource: mine\n")
    lines = [
        json.dumps({"id": f"{i:x}", "input": f"q{i}", "choices": ["a", "b"], "answer": answer})
        for i in range(30)
    ]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    return folder


def test_import_folders() -> None:
    """One, then all folders of one, then the same again."""
    one = task_folder(Path("all/one"), "one")
    task_folder(Path("all/two"), "family/two")
    assert run_hub("tasks", "import", one, "--suite", "mine").out == "mine:one\n"
    ran = run_hub("tasks", "import", "all", "--suite", "mine", "--json")
    assert ran.json == {
        "schema": 1,
        "imported": ["mine:one", "mine:family/two"],
        "left_out": [],
    }
    before = run_hub("tasks", "list", "--json").out
    assert run_hub("tasks", "import", "all", "--suite", "mine").code == 0
    assert run_hub("tasks", "list", "--json").out == before
    assert run_hub("tasks", "list", "-q").out.split() == ["mine:family/two", "mine:one"]


# How the command starts and ends


LIGHT = """
import sys, io, contextlib
from experthub.cli.main import app
for words in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            app(words.split())
        except SystemExit as end:
            assert not end.code, (words, end.code)
    heavy = {"torch", "transformers", "peft"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


def test_light_commands_do_not_import_torch(two: list[Path], base_folder: Path) -> None:
    Path("registry.yaml").write_text(
        f"version: 1\nbases:\n  tiny: {{sources: ['file:{base_folder}']}}\n"
    )
    lines = ["--help", "list", "list --json", "show one", "pull one two", "pull tiny", "tasks list"]
    lines += [f"add {two[0]} --name again --no-proof"]
    lines += [f"add {two[1]} --name far --base elsewhere", "base list", "base show tiny"]
    lines += ["base --help", "convert --help", "eval --help", "train lora --help", "--version"]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *lines], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_plan_does_not_load_a_model(
    two: list[Path], base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers are enough: the weights themselves are not read."""

    def loaded(*_: object) -> None:
        raise AssertionError("weights were loaded")

    path = recipe("mean", base_folder, "merge: {method: linear}", "one", "two")
    monkeypatch.setattr("experthub.hub.composition.assembly.load_model", loaded)
    monkeypatch.setattr("experthub.hub.composition.assembly.load_task_vector", loaded)
    assert run_hub("compose", path).code == 0
    with pytest.raises(AssertionError, match="were loaded"):
        run_hub("compose", path, "--out", "out")


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, when it hits in the middle of a command."""

    def slow(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(Registry, "read", slow)
    ran = run_hub("list")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.startswith("error: interrupted\nhint: ")


def test_interrupted_while_writing_leaves_nothing(
    two: list[Path], base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe("mean", base_folder, "merge: {method: linear}", "one", "two")
    before = snapshot(Path.cwd())

    def stopped(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("experthub.hub.files.atomic.sync_file", stopped)
    ran = run_hub("compose", path, "--out", "out")
    assert (ran.code, ran.out) == (130, "")
    assert snapshot(Path.cwd()) == before
    assert [p.name for p in Path.cwd().iterdir()] == ["mean.yaml"]


def test_reader_that_goes_away(two: list[Path]) -> None:
    """`hub list | head -0`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-c", "from experthub.cli.main import app; app()", "list", "--json"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr


def test_eval_refuses_numbers_that_mean_nothing(
    recipes: list[Path], tiny_task: str, base_folder: Path, tmp_path: Path
) -> None:
    """A model that overflows has no scores."""
    vector = tmp_path / "vector"
    vector.mkdir()
    norm = load_file(base_folder / "model.safetensors")["model.norm.weight"]
    save_file({"model.norm.weight": norm * 0 + 3e38}, vector / "task_vector.safetensors")
    path = recipe("huge", base_folder, "merge: {method: task_arithmetic, scale: 1}", str(vector))
    ran = run_hub("eval", path, "--tasks", tiny_task, "--limit", "2")
    assert ran.code == 3 and ran.out == ""
    assert "NaN or infinity" in ran.lines("error:")[0]
