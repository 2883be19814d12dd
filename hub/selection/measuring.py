"""Ranking of experts for a task, from a few of its examples; no expert needs to be trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from experthub.hub.bases.base_sources import find
from experthub.hub.bases.loading import load_model
from experthub.hub.errors import HubError, UsageError
from experthub.hub.evaluation.chosen_tasks import check_tasks
from experthub.hub.evaluation.evaluation import evaluate
from experthub.hub.materials.sentence_encoder import SentenceEncoder
from experthub.hub.readers.features import Features
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.selection.affinity import ROUTERS, ExpertScores, compute_affinities
from experthub.hub.selection.candidates import plan_candidates
from experthub.hub.selection.embeddings import average_embeddings, embed_own_tasks, read_own_texts
from experthub.hub.selection.suggestion import (
    LABELLED,
    RANKING_MEASURES,
    RankedBy,
    Suggestion,
    choose_measure,
)
from experthub.hub.selection.tmi import compute_tmi
from experthub.hub.session import Session
from experthub.hub.tasks.task import Split, Task
from experthub.hub.tasks.task_files import read_task

OTHERS = 256  # the largest number of texts, over all other tasks, that relative weights read


def suggest(
    task: str,
    experts: Sequence[str] = (),
    *,
    base: str | None = None,
    by: RankedBy = "all",
    rank_by: RankedBy | None = None,
    k: int | None = None,
    examples: int = 32,
    labels: bool = False,
    relative: bool = True,
    truth: bool = False,
    split: Split = "test",
    limit: int | None = None,
    embedder: str = "all-minilm-l6-v2",
    session: Session | None = None,
) -> Suggestion:
    """Rank experts for a task, from a few examples of its training split.

    Args:
        task: The task's reference.
        experts: References. The default is all experts of the base.
        base: The base's reference. The default is the base of the experts.
        by: A measure, or `all` for every measure that can be computed. `gates` and `prototypes` are
            the mean weights that the routers PHATGOOSE and Arrow would give an expert in one pass of
            the base. `embeddings` is the cosine with examples of the expert's own task. `tmi` is the
            entropy of features within the classes of the task.
        rank_by: The measure that orders the experts. The default is the best computed measure.
        k: The number of experts that a recipe will need. It is checked early, and does not limit the
            result.
        examples: The largest number of examples, at least 1.
        labels: Allow measures to read the right answers. Only `tmi` needs and gets them.
        relative: Divide `gates` and `prototypes` by the geometric mean of the expert's weights on
            the tasks that the experts were trained on, except the requested task. The tasks must be
            imported. This corrects for experts that get a large weight on every input.
        truth: Also evaluate each expert alone.
        split: The split for `truth`.
        limit: The largest number of examples for `truth`.
        embedder: The sentence encoder for `embeddings`.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The experts with their scores.

    Raises:
        UsageError: A measure needs labels that are not allowed, `rank_by` is not computed, or k is
            too large.
        HubError: No expert has a score.

    Example:
        from experthub import hub

        experts = ["sentiment", "intent-recognition", "question-typing"]
        found = hub.suggest("bigbench:implicatures", experts, by="prototypes")
        print(found.select_best(2), found.scores["prototypes"])
    """
    session = session or Session()
    _check_measures(by, rank_by, labels)
    read = read_task(task)
    plan = plan_candidates(base, experts, session)
    if k is not None and k > len(plan.experts):
        raise UsageError(
            f"--k is {k}, but there are only {len(plan.experts)} experts of {plan.base.name}",
            f"set --k to {len(plan.experts)} or less",
        )
    if truth:
        check_tasks([task], {plan.base.name: plan}, split, limit)
    features, answers = Features(plan.base), _read_answers(read, examples) if labels else None
    inputs = _Inputs(plan, features, read, examples, relative, session)
    scores = inputs.compute_scores(by, embedder, answers)
    if rank_by is not None and rank_by not in scores:
        raise HubError(
            f"no expert has a score by {rank_by}", f"set --rank-by to one of {', '.join(scores)}"
        )
    divided = bool(ROUTERS.keys() & scores.keys() and inputs.others)
    decides = rank_by or choose_measure(scores, divided)
    made = Suggestion(plan, read, len(inputs.texts), labels, scores, divided, decides)
    del inputs  # The base that it holds is freed before the evaluation loads it again.
    if not truth:
        return made
    singles = {reference: _build_single(plan, reference) for reference in made.references}
    result = evaluate(singles, [task], split=split, limit=limit, session=session)
    return replace(made, truth=_collect_truth(result, made.references), n=result["tasks"][0]["n"])


def _check_measures(by: RankedBy, rank_by: RankedBy | None, labels: bool) -> None:
    """Refuse measures that cannot be computed, before anything is read."""
    for measure in (by, rank_by):
        if measure in LABELLED and not labels:
            raise UsageError(
                f"{measure} reads the right answers", "pass --labels, or use another measure"
            )
    if rank_by == "all":
        raise UsageError(
            "--rank-by needs one measure, not all", f"use one of {', '.join(RANKING_MEASURES)}"
        )
    if rank_by is not None and by not in ("all", rank_by):
        raise UsageError(
            f"--rank-by is {rank_by}, but --by {by} does not compute it",
            f"pass --by {rank_by} or --by all",
        )


@dataclass(frozen=True)
class _Inputs:
    """The inputs of the measures: the experts, and the texts of a task without its answers."""

    plan: Plan
    features: Features
    task: Task
    examples: int
    relative: bool
    session: Session

    @cached_property
    def model(self) -> Any:
        """The base in float32, loaded on first use."""
        self.session.report("loading the base", 0, 0)
        return load_model(self.plan.base, "float32", self.session.device)

    @cached_property
    def texts(self) -> list[str]:
        """The texts of the task's examples."""
        found = self.features.texts(self.task, self.examples)
        self.session.report(f"reading {len(found)} examples of {self.task.reference}", 0, 0)
        return found

    @cached_property
    def own(self) -> Mapping[str, Sequence[str]]:
        """The texts of the tasks that the experts were trained on, by reference of the task."""
        return read_own_texts(
            self.plan, lambda task: self.features.texts(task, self.examples), self.session.report
        )

    @cached_property
    def others(self) -> list[Sequence[str]]:
        """A few texts of each of the experts' own tasks, except this task, for relative weights."""
        if not self.relative:
            return []
        found = [texts for name, texts in self.own.items() if name != self.task.reference]
        return [texts[: max(1, OTHERS // len(found))] for texts in found]

    def compute_scores(
        self, by: str, embedder: str, answers: Sequence[str] | None
    ) -> dict[str, ExpertScores]:
        """Compute the measures, and omit those by which no expert has a score."""
        wanted = RANKING_MEASURES if by == "all" else (by,)
        measures = [measure for measure in wanted if measure in ROUTERS]
        found: dict[str, ExpertScores] = {}
        if measures:
            args = self.plan, self.features, self.model, self.texts, self.others, measures
            found |= compute_affinities(*args, self.session)
        if "embeddings" in wanted:
            found["embeddings"] = self._compare_embeddings(embedder)
        if "tmi" in wanted and answers is not None:
            labelled = self.plan, self.features, self.model, self.texts, answers
            found["tmi"] = compute_tmi(*labelled, self.session)
        for measure in [m for m, scores in found.items() if set(scores) == {None}]:
            del found[measure]
            self.session.report(
                f"note: {measure} is omitted: no expert has the data that it reads", 0, 0
            )
        if not found:
            raise HubError(
                f"no expert of {self.plan.base.name} has a score by {by}",
                "use another measure with --by",
            )
        return found

    def _compare_embeddings(self, embedder: str) -> ExpertScores:
        """Compute the cosine between the task and each expert's own tasks."""
        embed = SentenceEncoder.load(find(embedder, self.session))
        here_D = average_embeddings(embed, self.texts)
        own = embed_own_tasks(self.plan, embed, self.own, self.session.report)
        return [None if own_D is None else float(own_D @ here_D) for own_D in own]


def _read_answers(task: Task, examples: int) -> list[str]:
    """Read the right answers of the examples, which are the classes of a task."""
    return [task.format_answer(example) for example in task.split("train", examples)]


def _build_single(plan: Plan, reference: str) -> Recipe:
    """Build the recipe of one expert alone."""
    recipe = {"base": plan.recipe.base, "experts": [reference], "merge": {"method": "linear"}}
    return Recipe.of(recipe)


def _collect_truth(result: dict[str, Any], references: Sequence[str]) -> dict[str, list[float]]:
    """Collect what every expert scores alone, from the result of an evaluation."""
    methods = result["tasks"][0]["methods"]
    return {kind: [methods[r][kind] for r in references] for kind in ("accuracy", "logprob")}
