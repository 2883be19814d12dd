"""The proof of routers: what its runner keeps, and what its table says, on tiny data."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import tiny_bert
from experthub import hub
from experthub.hub.evaluation import evaluation
from experthub.hub.evaluation.statistics import wilson_interval
from experthub.hub.files import yaml_files
from experthub.hub.registry.expert import Reference
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import read_task, write_task

FOLDER = Path(__file__).parents[2] / "examples" / "routers"


def script(name: str) -> ModuleType:
    """One of the scripts, as a module."""
    spec = importlib.util.spec_from_file_location(f"routers_{name}", FOLDER / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


run, summary = script("run"), script("summary")


def made(name: str, labels: list[str], words: Sequence[str]) -> str:
    """A task whose answer is said by a word of the input."""
    examples = []
    for n in range(120):
        text = f"{words[n % len(words)]} {n}"
        answer = labels[n % len(labels)]
        examples.append(Example(id=example_id(text, labels), input=text, targets=[answer]))
    card = Card(name=name, source=name, kind="labels", labels=labels)
    return write_task("local", card, examples)


@pytest.fixture
def proof(tmp_path: Path) -> dict[str, Any]:
    trained = [
        made("colours", ["red", "green"], ["fire", "grass"]),
        made("sizes", ["big", "small"], ["whale", "ant"]),
    ]
    near, far = made("hues", ["blue", "gold"], ["sea", "ring"]), made("odd", ["0", "1"], ["n", "m"])
    base = str(tiny_bert(tmp_path / "encoder"))
    return {
        "name": "tiny",
        "base": base,
        "tasks": trained,
        "unseen": {"near": [near], "far": [far]},
        "train": {"steps": 3, "examples": 40, "batch_size": 4, "lr": 1e-2},
        "gate": {"steps": 2, "examples": 40, "batch_size": 4, "lr": 1e-2},
        "closed_gate": {"start": 0.1},
        "advised_gate": {"start": 0.1, "below": 1.0},
        "limit": 12,
        "own_limit": 8,
        "recipes": {
            "uniform": {"route": {"method": "uniform"}},
            "phatgoose": {"route": {"method": "phatgoose", "top_k": 1}},
            "closed": {"gate": "closed_gate", "route": {"method": "phatgoose", "top_k": 1}},
            "retrieval": {"route": {"method": "retrieval", "embedder": base}},
        },
        "watched": ["phatgoose", "retrieval"],
        "shown": ["phatgoose"],
    }


@pytest.mark.slow
def test_a_run_holds_every_column_and_goes_on_where_it_stopped(
    proof: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.Run(proof, 0)
    found = first.all()
    unseen, columns = first.unseen, found["unseen"]["columns"]
    columns |= first.of_multi_task()
    controls = {"merged", "best_individual", "oracle", "multi_task"}
    assert set(columns) == {"base", *proof["recipes"]} | controls
    for column in columns.values():
        assert {task: len(column["right"][task]) for task in unseen} == dict.fromkeys(unseen, 12)
    assert columns["uniform"]["right"] == columns["merged"]["right"]
    assert set(found["own"]) == {"base", *proof["recipes"], "individual"}
    for weights in found["watched"]["phatgoose"].values():
        assert sum(weights) == pytest.approx(1, abs=1e-4) and min(weights) >= 0
    # One expert for the whole input: the weight is the share of inputs, by their tokens.
    task = proof["tasks"][1]
    assert summary.hits(found, "retrieval")[task] == (found["watched"]["retrieval"][task][1], 1)
    assert json.loads(json.dumps(found)) == found

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    composed: list[str] = []
    compose = evaluation.compose
    monkeypatch.setattr(hub, "train_lora", refuse)
    monkeypatch.setattr(hub, "train_gate", refuse)
    monkeypatch.setattr(
        evaluation,
        "compose",
        lambda plan, **more: composed.append(plan.recipe.method.method) or compose(plan, **more),
    )
    added = copy.deepcopy(proof)
    added["recipes"]["arrow"] = {"route": {"method": "arrow"}}
    second = run.Run(added, 0)
    again = second.all()["unseen"]["columns"] | second.of_multi_task()
    assert set(composed) == {"arrow"}
    assert {name: again[name] for name in columns} == columns


def entry(reference: str) -> hub.Expert:
    return hub.Registry.read().find_expert(Reference.parse(reference))


@pytest.mark.slow
def test_experts_that_are_there_are_taken_as_they_are(proof: dict[str, Any]) -> None:
    trained = run.Run(proof, 0).experts
    given = {key: proof[key] for key in proof if key not in ("train", "gate")}
    found = run.Run({**given, "experts": trained}, 0).all()
    assert found["experts"] == trained
    assert summary.section("tiny", [found])
    shipped = yaml_files.read(FOLDER / "smollm2.yaml").value
    names = [entry(name) for name in shipped["experts"]]
    assert [e.task for e in names] == shipped["tasks"] and {e.base for e in names} == {
        shipped["base"]
    }


def test_seeds_are_other_experts(proof: dict[str, Any]) -> None:
    references = [run.Run(proof, seed).expert(proof["tasks"][0]) for seed in (0, 1)]
    assert len({entry(reference).digest for reference in references}) == 2


def test_gates_are_trained_again_when_their_settings_change(proof: dict[str, Any]) -> None:
    task = proof["tasks"][0]
    first = run.Run(proof, 0).gated(task)
    assert run.Run(proof, 0).gated(task).digest == first.digest
    proof["gate"]["steps"] = 4
    second = run.Run(proof, 0).gated(task)
    assert (first.reference[-2:], second.reference[-2:]) == ("@2", "@3")
    assert second.training["gate"]["steps"] == 4
    third = run.Run(proof, 0).gated(task, "closed_gate")
    assert third.reference.endswith("@4")
    assert third.training["gate"] == {
        **second.training["gate"],
        **third.training["gate"],
        "start": 0.1,
    }
    assert run.Run(proof, 0).gated(task).digest == second.digest


@pytest.mark.parametrize(("below", "start"), [(1e6, 0.1), (1e-6, None)])
def test_gates_are_advised_where_there_is_no_loss(
    proof: dict[str, Any], below: float, start: float | None
) -> None:
    proof["advised_gate"]["below"] = below
    gates = run.Run(proof, 0).gated(proof["tasks"][0], "advised_gate").training["gate"]
    assert gates.get("start") == start


def test_the_expert_of_all_tasks_sees_training_examples_only(proof: dict[str, Any]) -> None:
    one = run.Run(proof, 0)
    expert = entry(one.multi_task())
    assert expert.training["steps"] == 3 * 2
    mixed = {example.input for example in read_task(expert.task or "").examples}
    trained = [e.input for t in proof["tasks"] for e in read_task(t).split("train", 40)]
    assert mixed == set(trained)


def test_the_tasks_are_those_that_the_trials_speak_for() -> None:
    """Trained are tasks that were learned; none of them is unseen; the base is no guesser there."""
    proof = yaml_files.read(FOLDER / "encoder.yaml").value
    tried = json.loads((FOLDER / "encoder-candidates.json").read_text())
    for task in proof["tasks"]:
        found = tried[task.partition(":")[2]]
        assert found["delta_ci95"][0] > 0 and found["expert"] > (found["most_common"] or 0), task
    bases = json.loads((FOLDER / "encoder-unseen-candidates.json").read_text())
    groups = proof["unseen"]
    unseen = [task for group in groups.values() for task in group]
    assert len(set(unseen)) == len(unseen) >= 16 and not set(unseen) & set(proof["tasks"])
    for task in groups["far"]:
        found = bases[task.partition(":")[2]]
        low, high = wilson_interval(found["base"] * found["n"], found["n"])
        assert found["n"] >= 60 and not low <= found["chance"] <= high, task


# The table, on results made by hand.


def result(seed: int, **columns: Sequence[str]) -> dict[str, Any]:
    """A run with one near and one far task; columns: what was right on each."""
    tasks = ["t:near", "t:far"]
    made = {
        name: {"right": dict(zip(tasks, right, strict=True)), "logprob": dict.fromkeys(tasks, -1.0)}
        for name, right in columns.items()
    }
    singles = {"own@2": dict.fromkeys(tasks, 0.8), "other@2": dict.fromkeys(tasks, 0.2)}
    return {
        "proof": {
            "name": "tiny",
            "base": "tiny-base",
            "tasks": ["t:own"],
            "unseen": {"near": tasks[:1], "far": tasks[1:]},
            "limit": 40,
            "own_limit": 20,
            "recipes": {"good": {}, "same": {}},
            "watched": ["good"],
            "shown": ["good"],
        },
        "seed": seed,
        "unseen": {"columns": made, "controls": {"singles": singles}},
        "own": {name: {"t:own": 0.5} for name in ("base", "good", "individual")},
        "experts": ["own@2", "other@2"],
        "watched": {
            "good": {"t:own": [0.4, 0.6] if seed else [0.9, 0.1], "t:near": [1, 0], "t:far": [0, 1]}
        },
    }


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    none, half, full = "0" * 40, "01" * 20, "1" * 40
    fixed = {"base": (none, half), "same": (none, half), "oracle": (full, full)}
    fixed |= {"best_individual": (half, half), "merged": (none, half)}
    return [result(0, good=(full, half), **fixed), result(1, good=(half, half), **fixed)]


def row(lines: Sequence[str], name: str) -> list[str]:
    found = [line for line in lines if line.startswith(f"| {name} |")]
    assert len(found) == 1
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_averages_are_those_of_tasks_groups_and_seeds(runs: list[dict[str, Any]]) -> None:
    good = row(summary.main_table(runs), "`good`")
    assert good[1:4] == ["0.625 ± 0.177", "0.750 ± 0.354", "0.500 ± 0.000"]


def test_a_task_is_won_by_its_own_interval(runs: list[dict[str, Any]]) -> None:
    lines = summary.main_table(runs)
    good, same = row(lines, "`good`"), row(lines, "`same`")
    assert good[4].startswith("+0.375 (+0.000..") and good[5] == "1, 1, 0"
    assert same[4] == "+0.000 (+0.000..+0.000)" and same[5] == "0, 2, 0"
    # Half of the near task's examples are won, none lost, against the best individual expert.
    assert good[6].startswith("+0.125") and good[7] == "1, 1, 0"
    assert same[7] == "0, 1, 1"


def test_the_difference_is_paired(runs: list[dict[str, Any]]) -> None:
    assert summary.minus(runs, "good", "base", "t:near") == [0.5, 1.0] * 20
    assert summary.minus(runs, "good", "base", "t:far") == [0.0] * 40


def test_columns_that_a_seed_lacks_are_left_out(runs: list[dict[str, Any]]) -> None:
    runs[0]["unseen"]["columns"]["multi_task"] = runs[0]["unseen"]["columns"]["good"]
    assert "multi_task" not in summary.columns_of(runs)
    runs[1]["unseen"]["columns"]["multi_task"] = runs[1]["unseen"]["columns"]["good"]
    assert summary.columns_of(runs)[-1] == "multi_task"


def test_hits_are_counted_over_tasks_and_seeds(runs: list[dict[str, Any]]) -> None:
    lines = summary.own_table(runs)
    assert row(lines, "`own`")[-1] == "0.650, 1.5"
    assert row(lines, "**first place**")[-1] == "0.500"


def test_what_a_router_chooses_is_scored_alone(runs: list[dict[str, Any]]) -> None:
    lines = summary.choice_table(runs)
    found = row(lines, "`good`: the heaviest expert, alone")
    assert found[1:] == ["0.500 ± 0.000", "0.800 ± 0.000", "0.200 ± 0.000"]
    assert row(lines, "mean of all experts, alone")[1] == "0.500 ± 0.000"


def test_results_are_found_by_name_and_seed(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    for one in runs:
        (tmp_path / f"tiny-{one['seed']}.json").write_text(json.dumps(one))
    (tmp_path / "tiny-candidates.json").write_text("{}")
    assert summary.results(tmp_path) == {"tiny": runs}
    text = "\n".join(summary.lines(tmp_path))
    assert "mean over seeds 0, 1" in text and "2 tasks that none of them was trained on" in text
