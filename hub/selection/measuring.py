"""Ranking experts for a task that they may not have been trained on, from a few of its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from experthub.hub.bases.base import load_model
from experthub.hub.errors import HubError, UsageError
from experthub.hub.evaluation.evaluation import check_tasks, evaluate
from experthub.hub.materials.embedder import Embedder
from experthub.hub.readers.features import Features
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.selection.affinity import ROUTERS, Scores, affinities
from experthub.hub.selection.candidates import candidates
from experthub.hub.selection.likeness import mean_embedding, own_embeddings, own_texts
from experthub.hub.selection.suggestion import (
    LABELLED,
    MEASURES,
    By,
    Suggestion,
    best_measure,
)
from experthub.hub.selection.tmi import tmi
from experthub.hub.session import Session
from experthub.hub.tasks.task import Split, Task
from experthub.hub.tasks.task_files import read_task

OTHERS = 256  # texts in all, by which weights are compared


def suggest(
    task: str,
    experts: Sequence[str] = (),
    *,
    base: str | None = None,
    by: By = "all",
    rank_by: By | None = None,
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
    """Rank experts for a task by what a few examples of its training split show.

    Args:
        task: The task's reference.
        experts: References. The default is all experts of the base.
        base: The base's reference. The default is the base of the experts.
        by: A measure, or `all` measures that can be computed. `gates` and `prototypes` are the
            weights that the routers PHATGOOSE and Arrow give an expert in one pass of the base.
            `embeddings` is the cosine with examples of the expert's own task. `tmi` is the entropy
            of features within classes.
        rank_by: The measure that decides. The default is the best of the computed ones.
        k: The number of experts wanted, which is checked before anything is read.
        examples: The largest number of examples, at least 1.
        labels: Whether the right answers may be used. Only `tmi` needs and gets them.
        relative: Divide `gates` and `prototypes` by the geometric mean of the expert's weight on the
            experts' own tasks that are imported, without this one. Some experts get a large weight
            on every input.
        truth: Evaluate each expert alone too.
        split: The split for `truth`.
        limit: The largest number of examples for `truth`.
        embedder: The sentence encoder for `embeddings`.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The experts with their scores.

    Raises:
        UsageError: A measure needs labels that are not allowed, or k is too large.
        HubError: No expert has a score.
    """
    session = session or Session()
    _check_measures(by, rank_by, labels)
    read = read_task(task)
    plan = candidates(base, experts, session)
    if k is not None and k > len(plan.experts):
        raise UsageError(
            f"--k {k}, and there are {len(plan.experts)} experts of {plan.base.name}",
            f"say --k {len(plan.experts)} or less",
        )
    if truth:
        check_tasks([task], {plan.base.name: plan}, split, limit)
    features, answers = Features(plan.base), _answers(read, examples) if labels else None
    inputs = _Inputs(plan, features, read, examples, relative, session)
    scores = inputs.scores(by, embedder, answers)
    if rank_by is not None and rank_by not in scores:
        raise HubError(f"no expert has a score by {rank_by}", f"there are {', '.join(scores)}")
    divided = bool(ROUTERS.keys() & scores.keys() and inputs.others)
    decides = rank_by or best_measure(scores, divided)
    made = Suggestion(plan, read, len(inputs.texts), labels, scores, divided, decides)
    del inputs  # and the base that it holds
    if not truth:
        return made
    singles = {reference: _single(plan, reference) for reference in made.references}
    result = evaluate(singles, [task], split=split, limit=limit, session=session)
    return replace(made, truth=_truth(result, made.references), n=result["tasks"][0]["n"])


def _check_measures(by: By, rank_by: By | None, labels: bool) -> None:
    """Refuse measures that will not be there, before anything is read."""
    for measure in (by, rank_by):
        if measure in LABELLED and not labels:
            raise UsageError(
                f"{measure} looks at the right answers", "say --labels, or use another measure"
            )
    if rank_by is not None and by not in ("all", rank_by):
        raise UsageError(f"--rank-by {rank_by}, and --by {by}", f"say --by {rank_by}, or all")
    if rank_by == "all":
        raise UsageError("--rank-by all is no measure", f"use one of {', '.join(MEASURES)}")


@dataclass(frozen=True)
class _Inputs:
    """What measures are given: experts, and the texts of a task without anything of its answers."""

    plan: Plan
    features: Features
    task: Task
    examples: int
    relative: bool
    session: Session

    @cached_property
    def model(self) -> Any:
        self.session.report("loading the base", 0, 0)
        return load_model(self.plan.base, "float32", self.session.device)

    @cached_property
    def texts(self) -> list[str]:
        found = self.features.texts(self.task, self.examples)
        self.session.report(f"reading {len(found)} examples of {self.task.reference}", 0, 0)
        return found

    @cached_property
    def own(self) -> Mapping[str, Sequence[str]]:
        """Texts of the tasks that experts were trained on."""
        return own_texts(
            self.plan, lambda task: self.features.texts(task, self.examples), self.session.report
        )

    @cached_property
    def others(self) -> list[Sequence[str]]:
        """What weights are compared with: the experts' own tasks but this one, few texts of each."""
        if not self.relative:
            return []
        found = [texts for name, texts in self.own.items() if name != self.task.reference]
        return [texts[: max(1, OTHERS // len(found))] for texts in found]

    def scores(self, by: str, embedder: str, answers: Sequence[str] | None) -> dict[str, Scores]:
        """By measure, those by which some expert has a score.  answers: for what needs them."""
        wanted = MEASURES if by == "all" else (by,)
        measures = [measure for measure in wanted if measure in ROUTERS]
        found: dict[str, Scores] = {}
        if measures:
            args = self.plan, self.features, self.model, self.texts, self.others, measures
            found |= affinities(*args, self.session)
        if "embeddings" in wanted:
            found["embeddings"] = self._likeness(embedder)
        if "tmi" in wanted and answers is not None:
            labelled = self.plan, self.features, self.model, self.texts, answers
            found["tmi"] = tmi(*labelled, self.session)
        for measure in [m for m, scores in found.items() if set(scores) == {None}]:
            del found[measure]
            self.session.report(f"note: no expert has what {measure} reads", 0, 0)
        if not found:
            raise HubError(
                f"no expert of {self.plan.base.name} has a score by {by}",
                "use another measure: --by",
            )
        return found

    def _likeness(self, embedder: str) -> Scores:
        embed = Embedder.load(embedder, self.session)
        here_D = mean_embedding(embed, self.texts)
        own = own_embeddings(self.plan, embed, self.own, self.session.report)
        return [None if own_D is None else float(own_D @ here_D) for own_D in own]


def _answers(task: Task, examples: int) -> list[str]:
    """The right answers of the examples, which are the classes of a task."""
    return [task.right_answer(example) for example in task.split("train", examples)]


def _single(plan: Plan, reference: str) -> Recipe:
    recipe = {"base": plan.recipe.base, "experts": [reference], "merge": {"method": "linear"}}
    return Recipe.of(recipe)


def _truth(result: dict[str, Any], references: Sequence[str]) -> dict[str, list[float]]:
    methods = result["tasks"][0]["methods"]
    return {kind: [methods[r][kind] for r in references] for kind in ("accuracy", "logprob")}
