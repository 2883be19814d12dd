"""Results of an evaluation: outcomes of examples, accuracies, intervals and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from typing import Any

import numpy
from experthub.hub.errors import IntegrityError
from experthub.hub.evaluation.statistics import bootstrap, bootstrap_groups, wilson_interval
from experthub.hub.files.digests import digest_of
from experthub.hub.readers.scorer import Measure, Question, Scores
from experthub.hub.tasks.task import Chosen, Example, Split, Task

BASE = "base"
SCORE_NAMES = {"mean": "mean-token-logprob", "sum": "sum-logprob", "byte": "mean-byte-logprob"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one model on the examples of one task.

    Args:
        scores: The scores of the choices, for each example.
        right: For each example, 1 if the choice with the highest score is the right one, else 0.
        logprobs: For each example, the log-softmax of the scores over the choices, at the right
            choice.
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
        dtype: str,
    ) -> Outcome:
        """Compare the scores of choices with the right answers.

        Args:
            task: The task.
            examples: Examples of the task.
            questions: The question of each example.
            scores: The scores of each question's choices.
            measure: The measure that normalises the scores.
            dtype: The dtype of the model, for the hint of an error.

        Returns:
            The outcome.

        Raises:
            IntegrityError: A score is NaN or infinite.
        """
        rows, right, logprobs = [], [], []
        for example, question, found in zip(examples, questions, scores, strict=True):
            choices = [choice.removeprefix(" ") for choice in question.choices]
            row = numpy.asarray(found.by(measure, choices))
            if not bool(numpy.isfinite(row).all()):
                raise IntegrityError(
                    f"the model returns NaN or infinity for task {task.reference}",
                    "set smaller weights for the experts in the recipe"
                    if dtype == "float32"
                    else "set dtype: float32 in the recipe",
                )
            answer = task.require_answer(example)
            rows.append(tuple(row.tolist()))
            right.append(float(int(row.argmax()) == answer))
            logprobs.append(
                float(row[answer] - row.max() - numpy.log(numpy.exp(row - row.max()).sum()))
            )
        return cls(tuple(rows), tuple(right), tuple(logprobs))


def build_result(
    chosen: Sequence[Chosen],
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    split: Split,
    score: str,
    seed: int,
) -> dict[str, Any]:
    """Build the result document from the outcomes.

    Args:
        chosen: The tasks with the examples that were scored.
        outcomes: The outcomes of each column, one per task.
        split: The split that was scored.
        score: The name of the score.
        seed: The seed of the bootstrap.

    Returns:
        The document as plain values; docs/evaluation.md describes its fields.
    """
    base = outcomes[BASE]
    rows = [
        {
            "task": one.task.reference,
            "digest": one.task.digest,
            "split": split,
            "n": len(one.examples),
            "metric": "accuracy",
            "methods": {
                name: _summarise_task(found[i], base[i], seed) for name, found in outcomes.items()
            },
        }
        for i, one in enumerate(chosen)
    ]
    return {
        "schema": 1,
        "tasks": rows,
        "average": {name: _summarise_tasks(found, base, seed) for name, found in outcomes.items()},
        "protocol": {
            "score": score,
            "template": digest_of({one.task.reference: one.task.card.template for one in chosen}),
            "shots": 0,
            "seed": seed,
        },
        "environment": read_versions(),
    }


def compare_columns(outcomes: Mapping[str, Sequence[Outcome]], seed: int) -> list[dict[str, Any]]:
    """Compute the paired difference of the average accuracy between every two columns.

    Args:
        outcomes: The outcomes of each column, one per task.
        seed: The seed of the bootstrap.

    Returns:
        A record for every pair: the two columns, the difference, and its 95 % interval.
    """
    pairs = []
    for a, b in combinations(outcomes, 2):
        differences = [_subtract(o, p) for o, p in zip(outcomes[a], outcomes[b], strict=True)]
        value, interval = mean([mean(d) for d in differences]), bootstrap_groups(differences, seed)
        pairs.append({"recipe": a, "than": b, "value": value, "ci95": interval})
    return pairs


def read_versions() -> dict[str, str]:
    """Read the versions of the packages that scores depend on.

    Returns:
        Package name -> version.
    """
    return {name: version(name) for name in ("torch", "transformers", "experthub")}


def _summarise_task(found: Outcome, base: Outcome, seed: int) -> dict[str, Any]:
    """Summarise a column's outcome on one task, next to the base."""
    differences = _subtract(found, base)
    return {
        "accuracy": mean(found.right),
        "ci95": wilson_interval(sum(found.right), len(found.right)),
        "logprob": mean(found.logprobs),
        "delta_to_base": {"value": mean(differences), "ci95": bootstrap(differences, seed)},
    }


def _summarise_tasks(
    found: Sequence[Outcome], base: Sequence[Outcome], seed: int
) -> dict[str, Any]:
    """Average a column over the tasks, which all have the same weight."""
    differences = [_subtract(o, b) for o, b in zip(found, base, strict=True)]
    return {
        "accuracy": mean([mean(o.right) for o in found]),
        "ci95": bootstrap_groups([o.right for o in found], seed),
        "logprob": mean([mean(o.logprobs) for o in found]),
        "delta_to_base": {
            "value": mean([mean(d) for d in differences]),
            "ci95": bootstrap_groups(differences, seed),
        },
    }


def _subtract(found: Outcome, base: Outcome) -> list[float]:
    """Subtract the base's correctness from a column's, example by example."""
    return [a - b for a, b in zip(found.right, base.right, strict=True)]


def mean(values: Sequence[float]) -> float:
    """Compute the arithmetic mean.

    Args:
        values: The values, at least one.

    Returns:
        The mean.
    """
    return sum(values) / len(values)


def list_samples(
    chosen: Sequence[Chosen], outcomes: Mapping[str, Sequence[Outcome]]
) -> list[dict[str, Any]]:
    """List a record for every example and column, with the score of each choice.

    Args:
        chosen: The tasks with the examples that were scored.
        outcomes: The outcomes of each column, one per task.

    Returns:
        The records, by task, example and column.
    """
    return [
        {
            "task": one.task.reference,
            "id": example.id,
            "method": name,
            "scores": list(found[i].scores[k]),
            "answer": one.task.find_answer(example),
            "right": bool(found[i].right[k]),
        }
        for i, one in enumerate(chosen)
        for k, example in enumerate(one.examples)
        for name, found in outcomes.items()
    ]
