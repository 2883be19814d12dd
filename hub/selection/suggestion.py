"""A suggestion: how experts compare for a task, and the recipe with the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from experthub.hub.errors import UsageError
from experthub.hub.evaluation.statistics import kendall, spearman
from experthub.hub.recipes.plan import Plan
from experthub.hub.selection.affinity import Scores
from experthub.hub.selection.written import method_for, way_of, write_recipe
from experthub.hub.session import Session
from experthub.hub.tasks.task import Task

Measure = Literal["gates", "prototypes", "embeddings", "tmi"]
By = Measure | Literal["all"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
# By docs/experiments.md; the second where weights are relative.
BEST: tuple[Measure, ...] = ("embeddings", "gates", "prototypes", "tmi")
BEST_RELATIVE: tuple[Measure, ...] = ("prototypes", "embeddings", "gates", "tmi")
FIRST = 5
LABELLED = ("tmi",)


def as_measure(text: str) -> By:
    """The name of a measure, or `all`; UsageError for any other."""
    known = (*MEASURES, "all")
    if text not in known:
        raise UsageError(f"unknown measure {text!r}", f"use one of {', '.join(known)}")
    return cast(By, text)


def best_measure(scores: Mapping[str, Scores], relative: bool) -> str:
    """The measure that decides: the best there is; of relative ones, among those for the most experts."""
    known = [m for m in (BEST_RELATIVE if relative else BEST) if m in scores]
    return max(known, key=lambda m: -scores[m].count(None)) if relative else known[0]


@dataclass(frozen=True)
class Suggestion:
    """How experts compare for a task.

    plan: the experts.  examples: how many were read.  labels: whether with the right answers.
    scores: by measure, every expert's in the plan's order, higher is better; None where an expert
    lacks what the measure reads.  relative: whether `gates` and `prototypes` are divided by what the
    expert gets on other tasks.  rank_by: the measure that decides.  truth: what every expert does
    alone on `n` examples of the task, by `accuracy` and `logprob`.
    """

    plan: Plan
    task: Task
    examples: int
    labels: bool
    scores: Mapping[str, Scores]
    relative: bool
    rank_by: str
    truth: Mapping[str, list[float]] = field(default_factory=dict)
    n: int = 0

    @property
    def references(self) -> list[str]:
        """Of the experts, in the plan's order."""
        return [expert.members[0].reference for expert in self.plan.experts]

    @property
    def order(self) -> list[int]:
        """The places of the experts that have a score, the best first; ties in the plan's order."""
        known = [
            (score, e) for e, score in enumerate(self.scores[self.rank_by]) if score is not None
        ]
        return [e for _, e in sorted(known, key=lambda one: (-one[0], one[1]))]

    def ranks(self, measure: str) -> list[int | None]:
        """Every expert's rank from 1; equal scores share the better one."""
        scores = self.scores[measure]
        known = [score for score in scores if score is not None]
        return [None if s is None else 1 + sum(o > s for o in known) for s in scores]

    def best(self, k: int | None = None) -> list[str]:
        """References of the k best; UsageError where fewer have a score.  k: None is 5, or all."""
        order = self.order
        if k is not None and k > len(order):
            raise UsageError(
                f"--k {k}, and {len(order)} experts have a score by {self.rank_by}",
                f"say --k {len(order)} or less",
            )
        return [self.references[e] for e in order[: FIRST if k is None else k]]

    def correlations(self) -> dict[str, dict[str, Any]]:
        """By measure and kind of truth: how well the measure ranks.

        `spearman` and `kendall`, over `n` experts; `first`, the truth of the expert that it puts
        first, beside the `best` and the `mean` of those `n`.
        """
        found: dict[str, dict[str, Any]] = {}
        for measure, scores in self.scores.items():
            known = [e for e, score in enumerate(scores) if score is not None]
            own = [score for score in scores if score is not None]
            for kind, values in self.truth.items():
                true = [values[e] for e in known]
                found.setdefault(measure, {})[kind] = {
                    "spearman": spearman(own, true),
                    "kendall": kendall(own, true),
                    "n": len(known),
                    "first": true[own.index(max(own))],
                    "best": max(true),
                    "mean": sum(true) / len(true),
                }
        return found

    def record(self) -> dict[str, Any]:
        """As plain values, for `--json`; experts in the order of the measure that decides."""
        ranks = {measure: self.ranks(measure) for measure in self.scores}
        rest = [e for e in range(len(self.references)) if e not in self.order]
        experts = [
            {
                "expert": self.references[e],
                "digest": self.plan.experts[e].digest,
                "task": self.plan.experts[e].members[0].task,
                "scores": {measure: scores[e] for measure, scores in self.scores.items()},
                "ranks": {measure: own[e] for measure, own in ranks.items()},
                **({"truth": {k: v[e] for k, v in self.truth.items()}} if self.truth else {}),
            }
            for e in (*self.order, *rest)
        ]
        judged = {"truth_n": self.n, "correlations": self.correlations()} if self.truth else {}
        return {
            "task": self.task.reference,
            "task_digest": self.task.digest,
            "base": self.plan.base.name,
            "examples": self.examples,
            "labels": self.labels,
            "relative": self.relative,
            "rank_by": self.rank_by,
            "experts": experts,
            **judged,
        }


def write_suggestion(
    found: Suggestion,
    k: int | None,
    path: Path | str,
    session: Session,
    method: str | None = None,
) -> Plan:
    """Write a recipe with the k best experts.

    Args:
        found: The ranked experts.
        k: The number of experts. None means 5, or all if there are fewer.
        path: The recipe file to write.
        session: The registry, the store and the progress callback.
        method: A router or a merge. The default is phatgoose if all experts have gates, linear if
            one is dense, and arrow otherwise.

    Returns:
        The recipe's plan.

    Raises:
        HubError: The experts lack what the method needs.
    """
    best = found.best(k)
    experts = tuple(e for e in found.plan.experts if e.members[0].reference in best)
    way = way_of(method or method_for(replace(found.plan, experts=experts)))
    recipe = {"base": found.plan.recipe.base, "experts": best, **way}
    why = (
        f"The {len(best)} of {len(found.references)} experts that fit {found.task.reference} best, "
        f"by {found.rank_by} on {found.examples} examples."
    )
    return write_recipe(Path(path), recipe, why, session)
