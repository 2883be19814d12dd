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
from experthub.hub.bases import Base, load_tokenizer
from experthub.hub.errors import HubError, UsageError
from experthub.hub.scoring.evaluation import score
from experthub.hub.scoring.likelihood import choice_logprobs, encode
from experthub.hub.scoring.statistics import bootstrap, wilson
from experthub.hub.tasks.task import Card, Example, example_id, read_task, write_task


def naive(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """Mean log-probability of the choice's tokens, in one plain forward, as lm-eval takes them."""
    context = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + choice)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    picked = [logprobs[t - 1, whole[t]].item() for t in range(len(context), len(whole))]
    return sum(picked) / len(picked)


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
    seen: list[int] = []
    found = choice_logprobs(model, items, batch_tokens=batch_tokens, done=seen.append)
    expected = [[naive(model, tokenizer, p, c) for c in choices] for p, choices in PROMPTS]
    for row, right in zip(found, expected, strict=True):
        assert row == pytest.approx(right, abs=2e-4)
    assert sum(seen) == len(items)


def test_a_choice_that_merges_with_the_prompt_has_its_own_prompt() -> None:
    """Tokens of prompt + choice minus those of the prompt, where the boundary moves."""

    def tokenizer(text: Any) -> dict[str, Any]:
        merged = {"ab c": [9, 3], "ab d": [1, 2, 4], "ab": [1, 2]}
        ids = [merged[t] for t in text] if isinstance(text, list) else merged[text]
        return {"input_ids": ids}

    items = encode(tokenizer, "ab", [" c", " d"])
    assert [(i.prompt, i.choices) for i in items] == [((9,), ((3,),)), ((1, 2), ((4,),))]


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


def test_accuracy_and_logprob_of_known_scores(base: Base, base_model: Any, tiny_task: str) -> None:
    task = read_task(tiny_task)
    examples = task.split("validation")
    tokenizer = load_tokenizer(base)
    outcome = score(base_model, tokenizer, task, examples)
    for example, right, logprob in zip(examples, outcome.right, outcome.logprobs, strict=True):
        values = [
            naive(base_model, tokenizer, task.prompt(example), c) for c in task.answers(example)
        ]
        assert right == float(values.index(max(values)) == example.answer)
        total = math.log(sum(math.exp(v) for v in values))
        assert logprob == pytest.approx(values[example.answer or 0] - total, abs=2e-4)


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
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def test_bootstrap_covers_the_mean() -> None:
    """About 95 of 100 intervals of samples with a known mean hold it."""
    random = numpy.random.default_rng(0)
    held = 0
    for _ in range(100):
        low, high = bootstrap([random.normal(1, 2, 80), random.normal(3, 1, 60)])
        held += low <= 2 <= high
    assert 88 <= held <= 100
