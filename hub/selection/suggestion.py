"""Suggestions: the ranking of experts for a task, and a recipe with the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from experthub.hub.errors import UsageError
from experthub.hub.evaluation.statistics import kendall, spearman
from experthub.hub.files.spelling import check_choice
from experthub.hub.recipes.plan import Plan
from experthub.hub.selection.affinity import ExpertScores
from experthub.hub.selection.recipe_writing import build_method_entry, choose_method, write_recipe
from experthub.hub.session import Session
from experthub.hub.tasks.task import Task

RankingMeasure = Literal["gates", "prototypes", "embeddings", "tmi"]
RankedBy = RankingMeasure | Literal["all"]
RANKING_MEASURES: tuple[RankingMeasure, ...] = get_args(RankingMeasure)
# Measures in order of preference, after the results in docs/experiments.md; the second order is for
# relative weights.
PREFERRED: tuple[RankingMeasure, ...] = ("embeddings", "gates", "prototypes", "tmi")
PREFERRED_RELATIVE: tuple[RankingMeasure, ...] = ("prototypes", "embeddings", "gates", "tmi")
FIRST = 5  # experts of a recipe if no number is given
LABELLED = ("tmi",)  # measures that read the right answers


def parse_ranking_measure(text: str) -> RankedBy:
    """Check the name of a measure.

    Args:
        text: The name of a measure, or `all`.

    Returns:
        The same name.

    Raises:
        UsageError: There is no such measure.
    """
    check_choice(text, (*RANKING_MEASURES, "all"), "measure")
    return cast(RankedBy, text)


def choose_measure(scores: Mapping[str, ExpertScores], relative: bool) -> str:
    """Choose the measure that orders the experts.

    It is the first available one in the order of preference. For relative weights, only the
    measures that give the most experts a score are considered.

    Args:
        scores: By measure, one score per expert.
        relative: Whether weights are relative.

    Returns:
        The name of the measure.
    """
    known = [m for m in (PREFERRED_RELATIVE if relative else PREFERRED) if m in scores]
    return max(known, key=lambda m: -scores[m].count(None)) if relative else known[0]


@dataclass(frozen=True)
class Suggestion:
    """A ranking of experts for a task.

    Args:
        plan: The experts.
        task: The task.
        examples: The number of examples that were read.
        labels: Whether the right answers were read too.
        scores: By measure, one score per expert in the order of the plan; higher is better. None
            for an expert that lacks what the measure reads.
        relative: Whether `gates` and `prototypes` are divided by the weight that the expert gets on
            other tasks.
        rank_by: The measure that orders the experts.
        truth: The `accuracy` and the `logprob` of every expert alone, in the order of the plan.
        n: The number of examples behind `truth`.
    """

    plan: Plan
    task: Task
    examples: int
    labels: bool
    scores: Mapping[str, ExpertScores]
    relative: bool
    rank_by: str
    truth: Mapping[str, list[float]] = field(default_factory=dict)
    n: int = 0

    @property
    def references(self) -> list[str]:
        """The references of the experts, in the order of the plan."""
        return [expert.members[0].reference for expert in self.plan.experts]

    @property
    def order(self) -> list[int]:
        """The positions in the plan of the experts with a score, best first; ties keep their order."""
        known = [
            (score, e) for e, score in enumerate(self.scores[self.rank_by]) if score is not None
        ]
        return [e for _, e in sorted(known, key=lambda one: (-one[0], one[1]))]

    def compute_ranks(self, measure: str) -> list[int | None]:
        """Rank the experts by a measure.

        Args:
            measure: A computed measure.

        Returns:
            One rank per expert in the order of the plan, from 1; equal scores share the better
            rank. None for an expert without a score.
        """
        scores = self.scores[measure]
        known = [score for score in scores if score is not None]
        return [None if s is None else 1 + sum(o > s for o in known) for s in scores]

    def select_best(self, k: int | None = None) -> list[str]:
        """Select the best experts.

        Args:
            k: The number of experts. None means 5, or all if there are fewer.

        Returns:
            The references of the experts, best first.

        Raises:
            UsageError: Fewer than k experts have a score.
        """
        order = self.order
        if k is not None and k > len(order):
            raise UsageError(
                f"--k is {k}, but only {len(order)} experts have a score by {self.rank_by}",
                f"set --k to {len(order)} or less",
            )
        return [self.references[e] for e in order[: FIRST if k is None else k]]

    def compute_correlations(self) -> dict[str, dict[str, Any]]:
        """Compare the order of every measure with the scores of the experts alone.

        Returns:
            By measure and kind of truth, a record over the `n` experts with a score: the rank
            correlations `spearman` and `kendall`, the truth of the `first` expert by the measure,
            and the `best` and the `mean` truth.
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
        """Return the suggestion as plain values, for `--json`.

        Returns:
            The document of docs/selection.md, with the experts in the order of `rank_by`.
        """
        ranks = {measure: self.compute_ranks(measure) for measure in self.scores}
        order, references = self.order, self.references
        rest = [e for e in range(len(references)) if e not in order]
        experts = [
            {
                "expert": references[e],
                "digest": self.plan.experts[e].digest,
                "task": self.plan.experts[e].members[0].task,
                "scores": {measure: scores[e] for measure, scores in self.scores.items()},
                "ranks": {measure: own[e] for measure, own in ranks.items()},
                **({"truth": {k: v[e] for k, v in self.truth.items()}} if self.truth else {}),
            }
            for e in (*order, *rest)
        ]
        judged = (
            {"truth_n": self.n, "correlations": self.compute_correlations()} if self.truth else {}
        )
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
        UsageError: Fewer than k experts have a score, or there is no such method.
        HubError: The experts lack what the method needs.
    """
    best = found.select_best(k)
    experts = tuple(e for e in found.plan.experts if e.members[0].reference in best)
    entry = build_method_entry(method or choose_method(replace(found.plan, experts=experts)))
    recipe = {"base": found.plan.recipe.base, "experts": best, **entry}
    comment = (
        f"The {len(best)} of {len(found.references)} experts that fit {found.task.reference} best, "
        f"by {found.rank_by} on {found.examples} examples."
    )
    return write_recipe(Path(path), recipe, comment, session)
