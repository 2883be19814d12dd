"""Zero-shot evaluation: the base and every composition rank the choices of every example."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.loading import load_model, load_tokenizer
from experthub.hub.composition.compose import compose
from experthub.hub.composition.composition import Composition
from experthub.hub.errors import UsageError
from experthub.hub.evaluation.cache import split_into_units
from experthub.hub.evaluation.chosen_tasks import read_chosen, refuse_trained
from experthub.hub.evaluation.controls import MERGED, pick_best_experts, plan_controls
from experthub.hub.evaluation.result import (
    BASE,
    SCORE_NAMES,
    Outcome,
    build_result,
    compare_columns,
    list_samples,
    read_versions,
)
from experthub.hub.readers.batching import ReaderScorer
from experthub.hub.readers.likelihood import Likelihood
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.readers.scorer import Long, Measure, Scorer, Scores
from experthub.hub.readers.similarity import Similarity, find_rule
from experthub.hub.readers.window import Window
from experthub.hub.recipes.lock import Pins, plan_of
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.session import Session
from experthub.hub.tasks.task import Chosen, Split

SCORING = 2  # Raised whenever a score changes, so that kept scores of older versions are not used.


def evaluate(
    recipes: Sequence[str | Path] | Mapping[str, Recipe],
    tasks: Sequence[str],
    *,
    split: Split = "test",
    limit: int | None = None,
    score: Measure = "mean",
    controls: bool = False,
    cache: bool = True,
    long: Long = "cut",
    with_samples: bool = False,
    pins: Pins | None = None,
    seed: int = 0,
    session: Session | None = None,
) -> dict[str, Any]:
    """Score the base and every recipe on every task.

    Args:
        recipes: Paths, whose file stems name the columns, or a mapping from names to recipes. All
            have one base: a language model, an encoder, a classifier, CLIP or SigLIP.
        tasks: References of tasks.
        split: `train`, `validation`, `test` or `all`. `all` is only for tasks on which no expert of
            a recipe was trained.
        limit: The largest number of examples per task.
        score: The score of a choice, from its tokens' log-probabilities: their `mean`, their `sum`,
            or the sum per `byte` of the choice.
        controls: Add the columns `best_individual`, `oracle` and `merged`.
        cache: Use and keep the scores of earlier runs.
        long: The rule for texts with more tokens than the base can read: `cut` drops the first
            tokens of a prompt, or the last tokens of another input, and `refuse` raises an error.
        with_samples: Add `samples`, the scores of every example.
        pins: How recipe files are resolved by their locks; see `plan_of`.
        seed: The seed of the bootstrap.
        session: The registry, the store, the device and the progress callback. The default is
            `Session()`.

    Returns:
        The result as plain values; docs/evaluation.md describes its fields.

    Raises:
        UsageError: The recipes differ in base or dtype, two columns would have the same name, a
            task has no choices to rank, a text is too long and `long` is `refuse`, or `split="all"`
            is used with a task on which an expert was trained.
        HubError: A recipe does not resolve, a task cannot be read, or a score is not finite.

    Example:
        from experthub import hub

        result = hub.evaluate(["recipe.yaml"], ["bigbench:implicatures"], limit=20)
        print(result["average"]["recipe"]["accuracy"])
    """
    session = session or Session()
    chosen = read_chosen(tasks, split, limit)
    paths: dict[str, str] = {}
    if isinstance(recipes, Mapping):
        if BASE in recipes:
            what = f"a recipe is named {BASE!r}, which is the column of the base"
            raise UsageError(what, "rename the recipe")
        plans = {name: resolve(one, session=session) for name, one in recipes.items()}
    else:
        paths = _name_columns(recipes)
        plans = {name: plan_of(path, pins, session=session) for name, path in paths.items()}
    base = _find_common_base(plans)
    if split == "all":
        refuse_trained(plans, [one.task for one in chosen])
    dtype = next(iter(plans.values())).dtype
    planned = plan_controls(plans, session) if controls else None
    evaluator = _Evaluator(replace(base, added=None), dtype, session, cache, long)
    outcomes = {
        name: evaluator.score_tasks(name, plan, chosen, score)
        for name, plan in {BASE: None, **plans}.items()
    }
    compared = {name: outcomes[name] for name in plans}
    picked: dict[str, Any] = {}
    if planned is not None:
        plans[MERGED], alone = planned
        outcomes[MERGED] = evaluator.score_tasks(MERGED, plans[MERGED], chosen, score)
        singles = {
            name: evaluator.score_tasks(name, plan, chosen, score) for name, plan in alone.items()
        }
        columns, picked = pick_best_experts(singles, chosen)
        outcomes |= columns
    protocol = SCORE_NAMES[score] if base.is_causal else evaluator.scorer.name
    found = build_result(chosen, outcomes, split=split, score=protocol, seed=seed)
    found["recipes"] = {n: {"digest": p.digest, "path": paths.get(n)} for n, p in plans.items()}
    found["comparisons"] = compare_columns(compared, seed)
    extra = {"controls": picked} if controls else {}
    return found | extra | ({"samples": list_samples(chosen, outcomes)} if with_samples else {})


class _Evaluator:
    """An evaluator of one base and the models composed on it; it loads a model when it needs one."""

    def __init__(self, base: Base, dtype: str, session: Session, cache: bool, long: Long) -> None:
        self.base, self.dtype, self.session, self.cache = base, dtype, session, cache
        self.long = long
        self.device = session.device or "cpu"
        self.virtual_tokens = 0

    @cached_property
    def model(self) -> Any:
        """The base, loaded on first use."""
        self.session.report("loading the base", 0, 0)
        return load_model(self.base, self.dtype, self.device)

    @cached_property
    def scorer(self) -> Scorer:
        """The scorer for this kind of base."""
        report = self.session.report
        if self.base.is_causal or self.base.is_encoder:
            window = Window.of(self.base, self.long, report, self.virtual_tokens)
            tokenizer = load_tokenizer(self.base)
            if self.base.is_causal:
                return Likelihood(tokenizer, window)
            return Similarity(lambda: self.model, tokenizer, window, find_rule(self.base))
        return ReaderScorer(
            reader_for(
                self.base,
                self.device,
                lambda: self.model,
                long=self.long,
                report=report,
                virtual_tokens=self.virtual_tokens,
            )
        )

    def score_tasks(
        self, name: str, plan: Plan | None, chosen: Sequence[Chosen], measure: Measure
    ) -> list[Outcome]:
        """Score the base, or the composition of a plan, on every task."""
        if plan and plan.base.added != self.base.added:
            return self._add_tokens(plan.base).score_tasks(name, plan, chosen, measure)
        if plan and plan.virtual_tokens != self.virtual_tokens:
            return self._leave_room(plan).score_tasks(name, plan, chosen, measure)
        methods = plan.recipe.methods if plan else []
        by_task = any("task" in method.strategy.needs for method in methods)
        surroundings: dict[str, Any] = {
            "composition": plan.digest if plan else [self.base.digest, self.dtype],
            "scorer": [self.scorer.name, SCORING, self.long],
            "device": self.device.partition(":")[0],
            "versions": read_versions(),
            **(_record_state(plan) if plan else {}),
        }
        composed: Composition | None = None
        found = []
        for one in chosen:
            what = f"{name} on {one.task.reference}"
            questions = [self.scorer.question(one.task, example) for example in one.examples]
            scores: list[Scores] = []
            own = surroundings | ({"task": one.task.reference} if by_task else {})
            for unit in split_into_units(own, questions):
                known = unit.read() if self.cache else None
                if known is None:
                    composed = composed or self._compose(plan)
                    with composed.tasks(one.task.reference) if composed else nullcontext():
                        model = composed.model if composed else self.model
                        known = self.scorer.scores(model, unit.questions)
                    if self.cache:
                        unit.write(known)
                scores += known
                self.session.report(what, len(scores), len(questions))
            found.append(Outcome.of(one.task, one.examples, questions, scores, measure, self.dtype))
        return found

    def _add_tokens(self, base: Base) -> _Evaluator:
        """Return an evaluator of the same model that reads texts with the tokens of its experts."""
        found = copy.copy(self)
        found.base = base
        vars(found).pop("scorer", None)
        return found

    def _leave_room(self, plan: Plan) -> _Evaluator:
        """Return an evaluator of the same model that leaves room for soft prompts before texts."""
        found = copy.copy(self)
        found.virtual_tokens = plan.virtual_tokens
        vars(found).pop("scorer", None)
        return found

    def _compose(self, plan: Plan | None) -> Composition | None:
        """Compose a plan on the base; return None for the base itself."""
        if plan is None:
            return None
        return compose(plan, model=self.model, session=self.session)


def _record_state(plan: Plan) -> dict[str, Any]:
    """Record the pinned state of the method, on which the scores depend besides the digest."""
    return {"state": plan.found.digest} if plan.found else {}


def _name_columns(paths: Sequence[str | Path]) -> dict[str, str]:
    """Name the column of every recipe file by its stem, and refuse ambiguous names."""
    named = {Path(path).stem: str(path) for path in paths}
    if len(named) < len(paths) or BASE in named:
        raise UsageError(
            "every recipe needs a file name of its own other than 'base', "
            f"found: {', '.join(str(path) for path in paths)}",
            "rename one of the files",
        )
    return named


def _find_common_base(plans: Mapping[str, Plan]) -> Base:
    """Return the base of all plans; refuse plans with different bases or dtypes."""
    if not plans:
        raise UsageError("no recipes were given", "pass a recipe file: recipe.yaml")
    bases = {plan.base.digest: plan.base for plan in plans.values()}
    dtypes = {plan.dtype for plan in plans.values()}
    if len(bases) > 1 or len(dtypes) > 1:
        found = sorted({b.name for b in bases.values()} | (dtypes if len(dtypes) > 1 else set()))
        raise UsageError(
            f"the recipes have different bases or dtypes: {', '.join(found)}",
            "run one evaluation for each base and dtype",
        )
    return next(iter(bases.values()))
