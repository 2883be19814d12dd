"""From the scores of every choice to the result that people and programs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from typing import Any

import numpy
from experthub.hub.errors import HubError
from experthub.hub.evaluation.statistics import bootstrap, hierarchical, wilson
from experthub.hub.files.digests import digest_of
from experthub.hub.readers.scorer import Measure, Question, Scores
from experthub.hub.tasks.task import Chosen, Example, Split, Task

BASE = "base"
MEASURES = {"mean": "mean-token-logprob", "sum": "sum-logprob", "byte": "mean-byte-logprob"}


@dataclass(frozen=True)
class Outcome:
    """How one model did on one task, example by example.

    scores: of the choices.  right: 1 where the best choice is the right one.  logprobs: log-softmax
    of the scores over the choices, at the right one.
    """

    scores: tuple[tuple[float, ...], ...]
    right: tuple[float, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(
        cls,
        task: Task,
        examples: Sequence[Example],
        questions: Sequence[Question],
        scores: Sequence[Scores],
        measure: Measure,
    ) -> Outcome:
        """Judge scores; HubError for NaN or infinity among them."""
        rows, right, logprobs = [], [], []
        for example, question, found in zip(examples, questions, scores, strict=True):
            choices = [choice.removeprefix(" ") for choice in question.choices]
            row = numpy.asarray(found.by(measure, choices))
            if not bool(numpy.isfinite(row).all()):
                raise HubError(
                    f"the model gives NaN or infinity on {task.reference}", "try dtype: float32"
                )
            answer = task.answer(example) or 0
            rows.append(tuple(row.tolist()))
            right.append(float(int(row.argmax()) == answer))
            logprobs.append(
                float(row[answer] - row.max() - numpy.log(numpy.exp(row - row.max()).sum()))
            )
        return cls(tuple(rows), tuple(right), tuple(logprobs))


def result(
    chosen: Sequence[Chosen],
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    split: Split,
    score: str,
    seed: int,
) -> dict[str, Any]:
    """The document of the contracts; outcomes: by column, a task's each."""
    base = outcomes[BASE]
    rows = [
        {
            "task": one.task.reference,
            "digest": one.task.digest,
            "split": split,
            "n": len(one.examples),
            "metric": "accuracy",
            "methods": {
                name: _on_task(found[i], base[i], seed) for name, found in outcomes.items()
            },
        }
        for i, one in enumerate(chosen)
    ]
    return {
        "schema": 1,
        "tasks": rows,
        "average": {name: _average(found, base, seed) for name, found in outcomes.items()},
        "protocol": {
            "score": score,
            "template": digest_of({one.task.reference: one.task.card.template for one in chosen}),
            "shots": 0,
            "seed": seed,
        },
        "environment": versions(),
    }


def comparisons(outcomes: Mapping[str, Sequence[Outcome]], seed: int) -> list[dict[str, Any]]:
    """The paired difference of the average accuracy between every two columns."""
    pairs = []
    for a, b in combinations(outcomes, 2):
        differences = [_minus(o, p) for o, p in zip(outcomes[a], outcomes[b], strict=True)]
        value, interval = mean([mean(d) for d in differences]), hierarchical(differences, seed)
        pairs.append({"recipe": a, "than": b, "value": value, "ci95": interval})
    return pairs


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "experthub")}


def _on_task(found: Outcome, base: Outcome, seed: int) -> dict[str, Any]:
    differences = _minus(found, base)
    return {
        "accuracy": mean(found.right),
        "ci95": wilson(sum(found.right), len(found.right)),
        "logprob": mean(found.logprobs),
        "delta_to_base": {"value": mean(differences), "ci95": bootstrap(differences, seed)},
    }


def _average(found: Sequence[Outcome], base: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """The mean over the tasks, each counting the same."""
    differences = [_minus(o, b) for o, b in zip(found, base, strict=True)]
    return {
        "accuracy": mean([mean(o.right) for o in found]),
        "ci95": hierarchical([o.right for o in found], seed),
        "logprob": mean([mean(o.logprobs) for o in found]),
        "delta_to_base": {
            "value": mean([mean(d) for d in differences]),
            "ci95": hierarchical(differences, seed),
        },
    }


def _minus(found: Outcome, base: Outcome) -> list[float]:
    return [a - b for a, b in zip(found.right, base.right, strict=True)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def samples(
    chosen: Sequence[Chosen], outcomes: Mapping[str, Sequence[Outcome]]
) -> list[dict[str, Any]]:
    """A record for every example and column: what each choice scored, and which was right."""
    return [
        {
            "task": one.task.reference,
            "id": example.id,
            "method": name,
            "scores": list(found[i].scores[k]),
            "answer": one.task.answer(example),
            "right": bool(found[i].right[k]),
        }
        for i, one in enumerate(chosen)
        for k, example in enumerate(one.examples)
        for name, found in outcomes.items()
    ]
