"""Recipes whose merge learns: composed, interrupted, kept, locked, registered, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits, make_expert, run_hub, tiny_bert
from experthub import hub
from experthub.hub.bases.base import read
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.errors import ConflictError, UsageError
from experthub.hub.files import yaml_files
from experthub.hub.materials import merge_materials
from experthub.hub.materials.cma_es import minimize
from experthub.hub.materials.task_data import TaskData
from experthub.hub.readers import batching, graph_memory
from experthub.hub.readers.likelihood import encode, score_choices
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.readers.similarity import Similarity
from experthub.hub.recipes.entries import DataUse
from experthub.hub.recipes.examples import choose_examples
from experthub.hub.recipes.lock import plan_of
from experthub.hub.states import states
from experthub.hub.states.run_state import PROGRESS, run_folder, state_folder
from experthub.hub.tasks.task import Card, Chosen, Example, example_id
from experthub.hub.tasks.task_files import read_task, tasks_folder, write_task

Make = Callable[..., Path]
LEARNED = {
    "adamerging": {"steps": 4, "lr": 0.05, "batch_size": 8},
    "atlas": {"steps": 4, "batch_size": 8},
    "lorahub": {"steps": 5},
    "regmean": {},
    "regmean_plusplus": {},
    "fisher": {},
}


def task_named(name: str, count: int = 120, flip: int = 0) -> str:
    """Even or odd, with fixed labels; flip exchanges the answers."""
    labels = ["even", "odd"]
    examples = [
        Example(
            id=example_id(f"{name} {n}", labels),
            input=f"{name} {n}",
            targets=[labels[(n + flip) % 2]],
        )
        for n in range(count)
    ]
    card = Card(name=name, source="made-up", kind="labels", labels=labels)
    return write_task("local", card, examples)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(params=["causal", "encoder"])
def values(
    request: pytest.FixtureRequest, tmp_path: Path, base_folder: Path, encoder_folder: Path
) -> dict[str, Any]:
    """Base and two experts of a kind, and two tasks, as the values of a recipe."""
    base = base_folder if request.param == "causal" else encoder_folder
    targets = ("q_proj", "up_proj") if request.param == "causal" else ("query", "dense")
    experts = [make_expert(tmp_path / f"e{i}", base, i, targets=targets, size=0.2) for i in (1, 2)]
    tasks = [task_named("first"), task_named("second")]
    return {
        "base": str(base),
        "experts": list(map(str, experts)),
        "data": {"tasks": tasks, "limit": 12},
    }


def recipe(values: dict[str, Any], method: str = "adamerging", **options: Any) -> dict[str, Any]:
    labels = method in ("atlas", "lorahub") and options.get("setting") != "test_time"
    data = values["data"] | {"labels": labels}
    merge = {"method": method, **LEARNED[method], **options}
    return values | {"data": data, "merge": merge}


def written(value: dict[str, Any], name: str = "recipe.yaml") -> Path:
    Path(name).write_text(yaml_files.dump(value))
    return Path(name)


def weights(composition: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in composition.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_state_that_another_process_stored_first_is_used(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both make the state; the slower one takes what the faster one stored."""
    plan, make = hub.resolve(hub.Recipe.of(recipe(values))), states._make
    others = []

    def make_late(plan: Any, session: hub.Session) -> Any:
        monkeypatch.setattr(states, "_make", make)
        others.append(states.resolve_state(plan, session))
        return make(plan, session)

    monkeypatch.setattr(states, "_make", make_late)
    found = states.resolve_state(plan, hub.Session())
    assert torch.equal(found.values, others[0].values)
    assert not list(run_folder(plan).glob(".*"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", LEARNED)
def test_every_method_composes_and_composes_the_same_again(
    method: str, values: dict[str, Any]
) -> None:
    first = hub.compose(recipe(values, method))
    shutil.rmtree(run_folder(first.plan), ignore_errors=True)
    again = hub.compose(recipe(values, method))
    base = load_model(first.plan.base, "float32", None)
    assert same(weights(first), weights(again))
    if method != "lorahub":  # which may find that no expert is best
        changed = {n for n, p in base.named_parameters() if not torch.equal(p, weights(first)[n])}
        # Nothing depends on the encoder's pooler: its coefficient stays where it was.
        assert changed | {"pooler.dense.weight"} >= set(first.plan.parameters) >= changed


@pytest.mark.sampled(5)
@pytest.mark.parametrize("method", LEARNED)
def test_what_learns_does_so_without_gradients_around_it(
    method: str, values: dict[str, Any]
) -> None:
    whole = hub.compose(recipe(values, method))
    shutil.rmtree(run_folder(whole.plan), ignore_errors=True)
    with torch.no_grad():
        again = hub.compose(recipe(values, method))
    assert same(weights(whole), weights(again))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adamerging", {}),
        ("adamerging", {"plus_plus": True}),
        ("adamerging", {"objective": "marginal_entropy", "granularity": "task"}),
        ("atlas", {"granularity": "partition", "groups": 3}),
    ],
)
def test_examples_in_groups_give_the_gradients_of_all_together(
    method: str,
    options: dict[str, Any],
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = hub.compose(recipe(values, method, **options))
    shutil.rmtree(run_folder(whole.plan), ignore_errors=True)
    groups: list[int] = []
    monkeypatch.setattr(graph_memory, "GRAPH_BYTES", 60_000)
    monkeypatch.setattr(batching, "group_rows", counted(groups))
    again = hub.compose(recipe(values, method, **options))
    assert min(groups) > 1, "the examples of a step were read all together"
    one, other = weights(whole), weights(again)
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-5, atol=1e-6)


def counted(groups: list[int]) -> Callable[..., list[list[int]]]:
    """The grouping of inputs that also keeps the number of groups."""

    def group(sizes: Any, answers: Any, config: Any) -> list[list[int]]:
        found = graph_memory.group_rows(sizes, answers, config)
        if answers is not None:
            groups.append(len(found))
        return found

    return group


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", LEARNED)
def test_every_method_composes_on_a_gpu(method: str, values: dict[str, Any]) -> None:
    made = hub.compose(recipe(values, method), device="cuda")
    assert all(bool(torch.isfinite(p).all()) for p in weights(made).values())


def test_one_expert_may_stand_twice(values: dict[str, Any]) -> None:
    first = values["experts"][0]
    value = recipe(values) | {"experts": [first, {"expert": first, "as": "again"}]}
    assert hub.compose(value).state.values.shape[0] == 2
    path = written(value)
    assert run_hub("coefficients", path, "--name", "mine").code == 0
    again = {k: v for k, v in value.items() if k != "data"} | {"coefficients": "mine"}
    assert same(weights(hub.compose(value)), weights(hub.compose(again)))
    with pytest.raises(UsageError, match="made for e1, again, not for e2"):
        hub.compose(again | {"experts": values["experts"]})


def test_what_was_learned_is_not_learned_again(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(recipe(values))
    first = hub.compose(path)
    monkeypatch.setattr(merge_materials, "_read_data", lambda *_: pytest.fail("the data was read"))
    assert same(weights(first), weights(hub.compose(path)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("method", "after"), [("adamerging", 20), ("atlas", 20), ("lorahub", 31)])
def test_an_interrupted_run_goes_on(values: dict[str, Any], method: str, after: int) -> None:
    more = {"patience": 0} if method == "atlas" else {}
    value = recipe(values, method, steps=45, **more)
    whole = hub.compose(value)
    shutil.rmtree(run_folder(whole.plan))

    class Stop(Exception):
        pass

    def stop(what: str, done: int, _: int) -> None:
        if what.startswith(("learning", "searching")) and done == 31:
            raise Stop

    with pytest.raises(Stop):
        hub.compose(value, session=hub.Session(report=stop))
    seen: list[int] = []

    def see(what: str, done: int, _: int) -> None:
        if what.startswith(("learning", "searching")):
            seen.append(done)

    again = hub.compose(value, session=hub.Session(report=see))
    assert seen[0] == after + 1 and same(weights(whole), weights(again))
    assert not (run_folder(whole.plan) / PROGRESS).exists()


def test_labels_reach_no_unlabelled_merge(values: dict[str, Any]) -> None:
    """Another answer to every question, and labels allowed, give the same bits."""
    for options in ({}, {"method": "atlas", "setting": "test_time", "confidence": 0.1}):
        value = recipe(values, **options)
        first = hub.compose(value)
        for name in ("first", "second"):
            shutil.rmtree(tasks_folder() / "local" / name, ignore_errors=True)
            task_named(name, flip=1)
        value["data"] = value["data"] | {"labels": True}
        again = hub.compose(value)
        assert first.plan.digest != again.plan.digest and same(weights(first), weights(again))


def test_coefficients_are_an_artifact(values: dict[str, Any], home: Path) -> None:
    """Registered, shown, drawn, pushed, pulled, and composed without the data."""
    path = written(recipe(values, granularity="block"))
    ran = run_hub("coefficients", path, "--name", "learned", "--plot", "c.png", "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    composition = hub.compose(path)
    coefficients = composition.state
    assert found["coefficients"] == coefficients.values.tolist()
    assert found["blocks"] == list(coefficients.blocks) and len(found["history"]) == 4
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    assert [e["expert"] for e in found["experts"]] == ["e1", "e2"]
    table = run_hub("coefficients", path).out
    assert "entropy" in table and "e1" in table
    assert run_hub("push", "learned", "file:shared").code == 0
    shutil.rmtree(home / "tasks")
    shutil.rmtree(home / "runs")
    shutil.rmtree(home / "registry")
    assert run_hub("pull", "file:shared").code == 0
    without = {k: v for k, v in recipe(values, granularity="block").items() if k != "data"}
    again = hub.compose(without | {"coefficients": "learned"})
    assert same(weights(composition), weights(again))
    stored = written(without | {"coefficients": "learned"}, "stored.yaml")
    renamed = run_hub("coefficients", stored, "--name", "another")
    assert renamed.code == 0, renamed.err
    assert same(weights(composition), weights(hub.compose(without | {"coefficients": "another"})))
    shown = run_hub("show", "learned", "--json").json["expert"]
    assert shown["kind"] == "coefficients"


def test_a_lock_pins_what_was_learned(values: dict[str, Any], home: Path) -> None:
    path = written(recipe(values))
    assert run_hub("lock", path).code == 0
    first = weights(hub.compose(path))
    held = yaml_files.read(Path("recipe.lock.yaml")).value
    assert held["coefficients"]["digest"].startswith("sha256:")
    assert [t["task"] for t in held["data"]["tasks"]] == values["data"]["tasks"]
    assert run_hub("lock", "--check", path).code == 0
    shutil.rmtree(home / "tasks")
    shutil.rmtree(home / "runs")
    assert same(first, weights(hub.compose(plan_of(path, "frozen"))))
    ran = run_hub("compose", path, "--frozen", "--out", "model")
    assert ran.code == 0, ran.err
    assert run_hub("gc", "--json").code == 0
    task_named("first", flip=1)
    task_named("second", flip=1)
    stale = run_hub("lock", "--check", path)
    assert stale.code == 6, stale.err


def test_a_locked_closed_form_wants_the_tasks_that_were_pinned(values: dict[str, Any]) -> None:
    """It has no coefficients that a lock could hold, so its data must be the same."""
    path = written(recipe(values, "regmean"))
    assert run_hub("lock", path).code == 0
    assert "coefficients" not in yaml_files.read(Path("recipe.lock.yaml")).value
    first = weights(hub.compose(plan_of(path, "frozen")))
    assert same(first, weights(hub.compose(path)))
    shutil.rmtree(tasks_folder() / "local" / "second")
    task_named("second", flip=1)
    with pytest.raises(ConflictError, match="task local:second is sha256:"):
        hub.compose(plan_of(path, "frozen"))


def test_a_learned_merge_of_loras_is_one_plain_lora(values: dict[str, Any], tmp_path: Path) -> None:
    if "encoder" in values["base"]:
        return
    from peft import PeftModel

    for method in ("adamerging", "atlas", "lorahub"):
        composition = hub.compose(recipe(values, method))
        folder = composition.save(tmp_path / method, format="peft")
        adapted = PeftModel.from_pretrained(load_model(composition.plan.base, None, None), folder)
        torch.testing.assert_close(logits(adapted), logits(composition.model), rtol=1e-4, atol=1e-4)


def test_lorahub_is_peft_with_both_factors_summed(values: dict[str, Any]) -> None:
    """peft's weighted adapter of type `linear` sums A and B apart, by the root of each weight."""
    if "encoder" in values["base"]:
        return
    from peft import PeftModel

    composition = hub.compose(recipe(values, "lorahub", steps=30))
    found = composition.state.values[:, 0].tolist()
    assert any(found)
    base = load_model(composition.plan.base, None, None)
    model = PeftModel.from_pretrained(base, values["experts"][0], adapter_name="one")
    model.load_adapter(values["experts"][1], adapter_name="two")
    # Of squared weights, the roots are the weights: A and B each by their own, as LoraHub has it.
    for module in model.modules():
        if hasattr(module, "lora_A") and "one" in module.lora_A:
            a = sum(w * module.lora_A[n].weight for w, n in zip(found, ("one", "two"), strict=True))
            b = sum(w * module.lora_B[n].weight for w, n in zip(found, ("one", "two"), strict=True))
            module.lora_A["one"].weight.data.copy_(a)
            module.lora_B["one"].weight.data.copy_(b)
    model.set_adapter("one")
    torch.testing.assert_close(logits(model), logits(composition.model), rtol=1e-3, atol=1e-3)


class TestReading:
    """Logits of many inputs together are the scores of each by itself."""

    def data(self, values: dict[str, Any], **options: Any) -> TaskData:
        base = read(Path(values["base"]), "base")
        model = load_model(base, "float32", None)
        found = choose_examples(DataUse(tasks=values["data"]["tasks"], **options))
        return TaskData(model, reader_for(base, None), found, bool(options.get("labels")))

    def test_equals_the_scorer(self, values: dict[str, Any]) -> None:
        data = self.data(values, limit=9)
        rows = [torch.tensor([4, 0, 7]), torch.tensor([8, 1])]
        found = data.logits(rows)
        base = read(Path(values["base"]), "base")
        tokenizer = load_tokenizer(base)
        for reference, picked, logits_NC in zip(data.tasks, rows, found, strict=True):
            task = read_task(reference)
            examples = task.split("train", 9)
            for i, row in zip(picked.tolist(), logits_NC, strict=True):
                if base.is_causal:
                    choices = [" " + c for c in task.list_choices(examples[i])]
                    item = encode(tokenizer, task.format_prompt(examples[i]), choices)
                    sums = score_choices(data.model, item)[0]
                    wanted = [s / len(c) for s, c in zip(sums, item[0].choices, strict=True)]
                else:
                    scorer = Similarity(lambda: data.model, tokenizer)
                    question = scorer.question(task, examples[i])
                    wanted = list(scorer.scores(data.model, [question])[0].values)
                assert row.tolist() == pytest.approx(wanted, abs=1e-4)

    def test_says_which_positions_are_real(self, values: dict[str, Any]) -> None:
        data = self.data(values, limit=9)
        seen: list[tuple[int, int]] = []
        linear = next(m for m in data.model.modules() if type(m).__name__ == "Linear")

        def watch(_: Any, inputs: Any, __: Any) -> None:
            assert data.real is not None and data.real.shape == inputs[0].shape[:-1]
            seen.append((int(data.real.sum()), data.real.numel()))

        linear.register_forward_hook(watch)
        data.logits([torch.arange(9), torch.arange(9)])
        assert any(real < size for real, size in seen) and data.real is None

    def test_a_variation_is_the_same_for_a_number(self, values: dict[str, Any]) -> None:
        data = self.data(values, limit=9)
        rows = [torch.arange(9), torch.arange(9)]
        plain, one, again, two = (data.logits(rows, view) for view in (0, 1, 1, 2))
        assert torch.equal(one[0], again[0])
        assert not torch.equal(one[0], plain[0]) and not torch.equal(one[0], two[0])

    def test_shots_are_of_each_class(self, values: dict[str, Any]) -> None:
        use = DataUse(tasks=values["data"]["tasks"], labels=True, shots=3)
        for one in choose_examples(use):
            assert isinstance(one, Chosen) and sorted(one.labels) == [0, 0, 0, 1, 1, 1]


def wrong(values: dict[str, Any], match: str, **changes: Any) -> None:
    with pytest.raises(UsageError, match=match):
        hub.Recipe.of({k: v for k, v in (values | changes).items() if v is not None})


def test_recipes_that_say_too_little_or_too_much(values: dict[str, Any]) -> None:
    ada = {"method": "adamerging"}
    linear = {"method": "linear"}
    wrong(values, "adamerging learns from examples; set data", data=None, merge=ada)
    wrong(values, "linear learns nothing; remove data", merge=linear)
    wrong(values, "linear learns nothing", data=None, coefficients="x", merge=linear)
    wrong(values, "exclude each other", coefficients="x", merge=ada)
    wrong(
        values,
        "regmean keeps no state; remove coefficients:",
        data=None,
        coefficients="x",
        merge={"method": "regmean"},
    )
    wrong(values, "atlas needs right answers here; set labels: true", merge={"method": "atlas"})
    wrong(values, "needs labels: true", data=values["data"] | {"shots": 4}, merge=ada)
    wrong(values, "a task is named twice", data={"tasks": ["x:y", "x:y"]}, merge=ada)
    wrong(values, "unknown key 'split_'", data=values["data"] | {"split_": 1}, merge=ada)
    nested = {"merge": ada, "experts": values["experts"]}
    wrong(
        values,
        "a merge inside of another cannot learn",
        experts=[nested],
        data=None,
        merge=linear,
    )


def test_coefficients_that_do_not_fit(values: dict[str, Any]) -> None:
    path = written(recipe(values))
    assert run_hub("coefficients", path, "--name", "mine").code == 0
    without = {k: v for k, v in recipe(values).items() if k != "data"} | {"coefficients": "mine"}

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=match):
            hub.compose(without | changes)

    refused("made for adamerging, and the recipe names atlas", merge={"method": "atlas"})
    refused(
        "made with granularity: layer, and the recipe sets task",
        merge={"method": "adamerging", "granularity": "task"},
    )
    refused(
        "made for e1, e2, in another order .*; the recipe has e2, e1",
        experts=values["experts"][::-1],
    )
    refused("is an expert", coefficients=values["experts"][0])
    with pytest.raises(UsageError, match="holds learned coefficients, which is not an expert"):
        hub.compose({"base": values["base"], "experts": ["mine"], "merge": {"method": "linear"}})


def test_data_that_is_not_there(values: dict[str, Any]) -> None:
    missing = run_hub("compose", written(recipe(values | {"data": {"tasks": ["local:thrid"]}})))
    assert missing.code == 4 and "there is no task local:thrid" in missing.err
    few = values | {"data": {"tasks": [task_named("few", 2)], "split": "test"}}
    ran = run_hub("compose", written(recipe(few)))
    assert ran.code == 1 and "has no test examples" in ran.err
    wild = run_hub("compose", written(recipe(values, granularity="(")))
    assert wild.code == 2 and "regular expression" in wild.err


def test_the_plan_says_what_is_learned_from(values: dict[str, Any]) -> None:
    path = written(recipe(values))
    shown = run_hub("compose", path).out
    assert "learns from" in shown and "local:first, local:second (train, no labels)" in shown
    assert not run_folder(plan_of(path)).exists()  # a plan learns nothing
    assert run_hub("coefficients", path, "--name", "mine").code == 0
    without = {k: v for k, v in recipe(values).items() if k != "data"} | {"coefficients": "mine"}
    assert "mine@1  sha256:" in run_hub("compose", written(without, "stored.yaml")).out


def test_damaged_coefficients_are_refused(values: dict[str, Any], home: Path) -> None:
    path = written(recipe(values))
    composition = hub.compose(path)
    folder = state_folder(composition.plan)
    record = json.loads((folder / "coefficients.json").read_text())
    (folder / "coefficients.json").write_text(
        json.dumps(record | {"blocks": record["blocks"][:-1]})
    )
    ran = run_hub("compose", path, "--out", "model")
    assert ran.code == 3 and "expected one tensor" in ran.err and not Path("model").exists()


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("evaluations", [1, 2, 3, 7])
def test_cma_es_keeps_its_number_of_evaluations(experts: int, evaluations: int) -> None:
    points: list[list[float]] = []

    def loss(point: Sequence[float]) -> float:
        points.append(list(point))
        return sum(x * x for x in point)

    best = minimize(loss, [0.0] * experts, 1.5, evaluations, 0)
    assert len(points) == evaluations and best == points[0] == [0.0] * experts
