"""Scores against a naive forward per choice, and the statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from experthub import hub
from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_tokenizer
from experthub.hub.errors import HubError, UsageError
from experthub.hub.evaluation import cache, evaluation
from experthub.hub.evaluation.result import Outcome
from experthub.hub.evaluation.statistics import bootstrap, bootstrap_groups, wilson_interval
from experthub.hub.readers.likelihood import Likelihood, encode, score_choices
from experthub.hub.readers.scorer import Question, Scores
from experthub.hub.tasks.task import Card, Example, example_id
from experthub.hub.tasks.task_files import read_task, write_task


def naive(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """Summed log-probability of the choice's tokens, in one plain forward, as lm-eval takes them."""
    context = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + choice)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    picked = [logprobs[t - 1, whole[t]].item() for t in range(len(context), len(whole))]
    return sum(picked)


PROMPTS = [
    ("one", [" a", " bb", " c d e"]),
    ("a much longer prompt, in several words", [" x", " y"]),
    ("middle one", [" the same length", " the same lengtg"]),
]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("routed", [False, True])
def test_choices_score_as_in_a_plain_forward(
    batch_tokens: int,
    routed: bool,
    base: Base,
    base_folder: Path,
    base_model: Any,
    expert_folder: Callable[..., Path],
) -> None:
    """Whatever the batch: padding and the shared cache change nothing."""
    tokenizer, model = load_tokenizer(base), base_model
    if routed:
        experts = [str(expert_folder(e, size=0.2)) for e in range(3)]
        recipe = {"base": str(base_folder), "experts": experts, "route": {"method": "phatgoose"}}
        model = hub.compose(recipe, model=base_model).model
    items = [item for prompt, choices in PROMPTS for item in encode(tokenizer, prompt, choices)]
    found = score_choices(model, items, batch_tokens=batch_tokens)
    expected = [[naive(model, tokenizer, p, c) for c in choices] for p, choices in PROMPTS]
    for row, right in zip(found, expected, strict=True):
        assert row == pytest.approx(right, abs=5e-4)


def test_result_has_the_form_of_the_contract(
    base_folder: Path, tiny_task: str, expert_folder: Callable[..., Path]
) -> None:
    recipe = hub.Recipe.of(
        {
            "base": str(base_folder),
            "experts": [str(expert_folder(1))],
            "merge": {"method": "linear"},
        }
    )
    result = hub.evaluate({"merged": recipe}, [tiny_task], split="test")
    row = result["tasks"][0]
    task = read_task(tiny_task)
    assert (row["task"], row["n"]) == (tiny_task, len(task.split("test")))
    for scores in (row["methods"]["merged"], result["average"]["merged"]):
        low, high = scores["ci95"]
        assert 0 <= low <= scores["accuracy"] <= high <= 1
        assert scores["logprob"] < 0
        assert scores["delta_to_base"]["value"] == pytest.approx(
            scores["accuracy"] - row["methods"]["base"]["accuracy"]
        )
    assert row["methods"]["base"]["delta_to_base"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert result["protocol"]["score"] == "mean-token-logprob"
    again = hub.evaluate({"merged": recipe}, [tiny_task], split="test")
    assert again == result


@pytest.mark.parametrize("measure", ["mean", "sum", "byte"])
def test_accuracy_and_logprob_by_every_measure(
    measure: Any, base: Base, base_folder: Path, base_model: Any, tiny_task: str, recipe: Any
) -> None:
    task, tokenizer = read_task(tiny_task), load_tokenizer(base)
    examples = task.split("validation")
    found = hub.evaluate(
        {"merged": recipe}, [tiny_task], split="validation", score=measure, with_samples=True
    )
    by_base = [row for row in found["samples"] if row["method"] == "base"]
    assert [row["id"] for row in by_base] == [e.id for e in examples]
    for example, row in zip(examples, by_base, strict=True):
        prompt, choices = task.format_prompt(example), task.list_choices(example)
        values = [naive(base_model, tokenizer, prompt, f" {c}") for c in choices]
        if measure == "byte":
            values = [v / len(c.encode()) for v, c in zip(values, choices, strict=True)]
        if measure == "mean":
            n = len(tokenizer(prompt)["input_ids"])
            counts = [len(tokenizer(f"{prompt} {c}")["input_ids"]) - n for c in choices]
            values = [v / n for v, n in zip(values, counts, strict=True)]
        assert row["scores"] == pytest.approx(values, abs=5e-4)
        assert row["right"] == (values.index(max(values)) == example.answer)
    total = [row["scores"][row["answer"]] - logsumexp(row["scores"]) for row in by_base]
    mean = sum(total) / len(total)
    assert found["average"]["base"]["logprob"] == pytest.approx(mean)


def logsumexp(values: list[float]) -> float:
    return math.log(sum(map(math.exp, values)))


@pytest.fixture
def recipe(base_folder: Path, expert_folder: Callable[..., Path]) -> hub.Recipe:
    experts = [str(expert_folder(1))]
    merge = {"method": "linear"}
    return hub.Recipe.of({"base": str(base_folder), "experts": experts, "merge": merge})


class Stopped(BaseException):
    """The process is stopped."""


def test_a_rerun_loads_no_model_and_an_interrupted_run_goes_on(
    tiny_task: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only unknown scores are computed, and the digits are those of a whole run."""
    monkeypatch.setattr(cache, "UNIT", 4)
    settings = {"split": "train", "with_samples": True}
    whole = hub.evaluate({"merged": recipe}, [tiny_task], cache=False, **settings)
    score, calls = Likelihood.scores, 0

    def counted(self: Any, model: Any, questions: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stopped
        return score(self, model, questions)

    monkeypatch.setattr(Likelihood, "scores", counted)
    with pytest.raises(Stopped):
        hub.evaluate({"merged": recipe}, [tiny_task], **settings)
    assert hub.evaluate({"merged": recipe}, [tiny_task], **settings) == whole
    units = 2 * math.ceil(whole["tasks"][0]["n"] / 4)
    assert calls == units + 1
    monkeypatch.setattr(evaluation, "load_model", None)
    assert hub.evaluate({"merged": recipe}, [tiny_task], **settings) == whole
    assert calls == units + 1


def test_other_content_is_not_taken_from_the_cache(
    tiny_task: str, base_folder: Path, expert_folder: Callable[..., Path]
) -> None:
    def scored(weight: float, **settings: Any) -> Any:
        use = {"expert": str(expert_folder(1, size=0.5)), "weight": weight}
        merge = {"method": "task_arithmetic"}
        made = hub.Recipe.of({"base": str(base_folder), "experts": [use], "merge": merge})
        return hub.evaluate({"m": made}, [tiny_task], with_samples=True, **settings)["samples"]

    first = scored(1.0)
    assert scored(2.0) != first
    assert scored(1.0) == first
    assert len(scored(1.0, limit=2)) == 4


def test_a_damaged_result_is_computed_again(tiny_task: str, recipe: Any, home: Path) -> None:
    first = hub.evaluate({"merged": recipe}, [tiny_task])
    kept = list((home / "results").glob("*/*.json"))
    assert kept
    for path, text in zip(kept, ["", "{}", '{"scores": [[[1], [1]]]}', "[]"] * 9, strict=False):
        path.write_text(text)
    assert hub.evaluate({"merged": recipe}, [tiny_task]) == first


def test_the_order_of_recipes_changes_no_digit(
    tiny_task: str, recipe: Any, base_folder: Path, expert_folder: Callable[..., Path]
) -> None:
    uniform = {"experts": [str(expert_folder(2))], "route": {"method": "uniform"}}
    other = hub.Recipe.of({"base": str(base_folder), **uniform})
    one = hub.evaluate({"a": recipe, "b": other}, [tiny_task], with_samples=True, cache=False)
    two = hub.evaluate({"b": other, "a": recipe}, [tiny_task], with_samples=True, cache=False)
    for name in ("base", "a", "b"):
        rows = [[r for r in found["samples"] if r["method"] == name] for found in (one, two)]
        assert rows[0] == rows[1]


def test_controls_name_the_best_expert_and_the_best_of_every_task(
    tiny_task: str, base_folder: Path, expert_folder: Callable[..., Path]
) -> None:
    experts = [str(expert_folder(e, size=0.6)) for e in range(3)]
    route = {"method": "uniform"}
    made = hub.Recipe.of({"base": str(base_folder), "experts": experts, "route": route})
    found = hub.evaluate({"uniform": made}, [tiny_task], split="train", controls=True)
    singles = found["controls"]["singles"]
    assert set(singles) == set(experts)
    best = max(experts, key=lambda name: singles[name][tiny_task])
    assert found["controls"]["best_individual"] == best == found["controls"]["oracle"][tiny_task]
    average = found["average"]
    assert average["best_individual"]["accuracy"] == singles[best][tiny_task]
    merged = average["merged"]  # the mean of the deltas: what `uniform` is
    assert merged["logprob"] == pytest.approx(average["uniform"]["logprob"], abs=1e-4)
    alone = {"base": str(base_folder), "experts": [best], "merge": {"method": "linear"}}
    direct = hub.evaluate({"x": hub.Recipe.of(alone)}, [tiny_task], split="train")
    assert direct["average"]["x"] == average["best_individual"]


def test_no_recipe_takes_the_column_of_the_base(tiny_task: str, recipe: Any) -> None:
    with pytest.raises(UsageError, match="a recipe is named 'base'"):
        hub.evaluate({"base": recipe}, [tiny_task])


def test_controls_that_cannot_be_planned_are_refused_before_a_model_is_loaded(
    tiny_task: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(evaluation, "load_model")
    with pytest.raises(UsageError, match="merged is the name of a control"):
        hub.evaluate({"merged": recipe}, [tiny_task], controls=True)


def test_scores_that_are_not_finite_have_a_hint_that_helps(tiny_task: str) -> None:
    task = read_task(tiny_task)
    example = task.examples[0]
    questions, scores = [Question("x", ("yes", "no"))], [Scores((float("nan"), 0.0), (1, 1))]
    for dtype, hint in (("bfloat16", "float32"), ("float32", "smaller weights")):
        with pytest.raises(HubError, match="NaN") as caught:
            Outcome.of(task, [example], questions, scores, "mean", dtype)
        assert hint in caught.value.hint


def test_labels_of_a_card_are_ranked(recipe: Any) -> None:
    examples = [
        Example(id=example_id(text, ["good", "bad"]), input=text, targets=[label])
        for text, label in (("nice", "good"), ("awful", "bad"), ("fine", "good"))
    ]
    card = Card(name="mood", source="made-up", kind="labels", labels=["good", "bad"])
    reference = write_task("local", card, examples)
    found = hub.evaluate({"m": recipe}, [reference], split="all", with_samples=True)
    answers = {row["id"]: row["answer"] for row in found["samples"]}
    assert [answers[e.id] for e in examples] == [0, 1, 0]


def test_a_task_without_examples_in_a_split_is_refused() -> None:
    text = next(str(n) for n in range(1000) if int(example_id(str(n), ["a", "b"]), 16) % 100 < 70)
    example = Example(id=example_id(text, ["a", "b"]), input=text, choices=["a", "b"], answer=0)
    reference = write_task("local", Card(name="tiny", source="made-up"), [example])
    with pytest.raises(HubError, match="no test examples"):
        read_task(reference).split("test")


def test_recipes_of_different_bases_are_refused(
    tmp_path: Path, base_folder: Path, tiny_task: str, expert_folder: Callable[..., Path]
) -> None:
    from conftest import make_expert, tiny_llama

    other = tiny_llama(tmp_path / "other", seed=7)
    one = {
        "base": str(base_folder),
        "experts": [str(expert_folder(1))],
        "merge": {"method": "linear"},
    }
    two = {**one, "base": str(other), "experts": [str(make_expert(tmp_path / "e", other, 1))]}
    recipes = {"one": hub.Recipe.of(one), "two": hub.Recipe.of(two)}
    with pytest.raises(UsageError, match="different bases"):
        hub.evaluate(recipes, [tiny_task])


def test_wilson_interval_of_a_textbook_case() -> None:
    """Newcombe 1998, table I: 15 of 148 gives 0.0624 to 0.1605."""
    assert wilson_interval(15, 148) == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(1)


def test_intervals_cover_what_they_should() -> None:
    """Nominal 95 %, over samples with a known mean; bounds are four standard errors wide."""
    random, n = numpy.random.default_rng(0), 300
    held = {"wilson": 0, "bootstrap": 0, "hierarchical": 0}
    for _ in range(n):
        share = wilson_interval(random.binomial(60, 0.3), 60)
        held["wilson"] += share[0] <= 0.3 <= share[1]
        low, high = bootstrap(random.normal(1, 2, 80).tolist(), resamples=1000)
        held["bootstrap"] += low <= 1 <= high
        # Twelve tasks drawn around 0.5, sixty examples each: the mean over all such tasks.
        shares = numpy.clip(random.normal(0.5, 0.15, 12), 0, 1)
        groups = [random.binomial(1, p, 60).tolist() for p in shares]
        low, high = bootstrap_groups(groups, resamples=1000)
        held["hierarchical"] += low <= 0.5 <= high
    assert 0.91 * n <= held["wilson"] <= 0.99 * n
    assert 0.90 * n <= held["bootstrap"] <= 0.99 * n
    assert 0.88 * n <= held["hierarchical"] <= n


def test_a_hierarchical_interval_of_one_group_is_the_bootstrap() -> None:
    values = numpy.random.default_rng(1).normal(0, 1, 50).tolist()
    assert bootstrap_groups([values]) == pytest.approx(bootstrap(values), abs=0.02)


def test_a_hierarchical_interval_knows_that_tasks_differ() -> None:
    """Two tasks, each known exactly: the spread is that between them."""
    assert bootstrap_groups([[0.0] * 50, [1.0] * 50]) == [0.0, 1.0]
