"""Zero-shot evaluation: rank classification by log-likelihood, next to the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from experthub.hub._files import digest_of
from experthub.hub.bases import Base, Report, load_model, load_tokenizer, silent
from experthub.hub.composition import compose
from experthub.hub.errors import HubError, UsageError
from experthub.hub.plan import Plan
from experthub.hub.recipe import Recipe
from experthub.hub.registry import Registry
from experthub.hub.resolution import resolve
from experthub.hub.scoring.likelihood import choice_logprobs, encode
from experthub.hub.scoring.statistics import bootstrap, wilson
from experthub.hub.store import Store
from experthub.hub.tasks.task import Example, Split, Task, read_task

BASE = "base"


@dataclass(frozen=True)
class Outcome:
    """How one model did on one task, example by example.

    right: 1 where the likeliest choice is the right one.  logprobs: log-softmax over the choices,
    of their mean token log-probabilities, at the right one.
    """

    right: tuple[float, ...]
    logprobs: tuple[float, ...]


def evaluate(
    recipes: Sequence[str | Path] | Mapping[str, Recipe],
    tasks: Sequence[str],
    *,
    split: Split = "test",
    limit: int | None = None,
    device: str | None = None,
    seed: int = 0,
    registry: Registry | None = None,
    store: Store | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Score the base and every recipe on every task; returns the result of the contracts.

    recipes: paths, whose file stems name the columns, or names with recipes; all of one base.
    tasks: references.  split: `train`, `validation`, `test` or `all`; `all` only for tasks on
    which no expert of a recipe was trained.  limit: examples per task, at most.  seed: of the
    bootstrap.
    """
    registry, store = registry or Registry.read(), store or Store()
    paths = {} if isinstance(recipes, Mapping) else _named(recipes)
    named = (
        recipes if isinstance(recipes, Mapping) else {n: Recipe.read(p) for n, p in paths.items()}
    )
    read = [read_task(reference) for reference in tasks]
    chosen = {task.reference: task.split(split, limit) for task in read}
    for task in read:
        if task.card.kind != "choices" or any(e.choices is None for e in task.examples):
            raise UsageError(f"task {task.reference} has no choices to rank", "choose another task")
    plans = {name: resolve(recipe, registry, store, report) for name, recipe in named.items()}
    base = _one_base(plans)
    if split == "all":
        _refuse_trained(plans, read)
    tokenizer = load_tokenizer(base)
    report("loading the base", 0, 0)
    model = load_model(base, next(iter(plans.values())).dtype, device)
    if not model.can_generate():
        raise UsageError(f"{base.name} is no causal language model", "evaluate on another base")
    outcomes: dict[str, list[Outcome]] = {}
    for name, plan in {BASE: None, **plans}.items():
        composed = compose(plan, model=model, store=store).model if plan else model
        outcomes[name] = [
            score(
                composed,
                tokenizer,
                task,
                chosen[task.reference],
                lambda done, size, what=f"{name} on {task.reference}": report(what, done, size),
            )
            for task in read
        ]
    result = _result(read, chosen, outcomes, split, seed)
    result["recipes"] = {
        name: {"digest": plan.digest, "path": paths.get(name)} for name, plan in plans.items()
    }
    return result


def _named(paths: Sequence[str | Path]) -> dict[str, str]:
    named = {Path(path).stem: str(path) for path in paths}
    if len(named) < len(paths) or BASE in named:
        raise UsageError(
            "recipes are told apart by their file names, and two are the same or 'base'",
            "rename one of the files",
        )
    return named


def _one_base(plans: Mapping[str, Plan]) -> Base:
    if not plans:
        raise UsageError("there is no recipe to evaluate", "name a recipe.yaml")
    bases = {plan.base.fingerprint: plan.base for plan in plans.values()}
    dtypes = {plan.dtype for plan in plans.values()}
    if len(bases) > 1 or len(dtypes) > 1:
        found = sorted({b.name for b in bases.values()} | (dtypes if len(dtypes) > 1 else set()))
        raise UsageError(
            f"the recipes have different bases or dtypes: {', '.join(found)}",
            "evaluate them in separate runs",
        )
    return next(iter(bases.values()))


def _refuse_trained(plans: Mapping[str, Plan], tasks: Sequence[Task]) -> None:
    """Refuse tasks, by content, on which an expert of a recipe was trained."""
    unseen = {task.digest: task.reference for task in tasks}
    for name, plan in plans.items():
        for member in plan.members:
            trained = _digest_of(member.task, tasks)
            if trained in unseen:
                raise UsageError(
                    f"--split all: {member.reference} of {name} was trained on {unseen[trained]}",
                    "use --split test, which its training did not see",
                )


def _digest_of(reference: str | None, tasks: Sequence[Task]) -> str | None:
    """The content of the task that an expert names, as far as it is here."""
    for task in tasks:
        if task.reference == reference:
            return task.digest
    try:
        return read_task(reference).digest if reference else None
    except HubError:
        return None


@torch.no_grad()
def score(
    model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], progress: Any = None
) -> Outcome:
    """Rank the choices of every example by their mean token log-probability after the prompt."""
    items, owner = [], []
    for index, example in enumerate(examples):
        encoded = encode(tokenizer, task.prompt(example), task.answers(example))
        items += encoded
        owner += [index] * len(encoded)
    count = 0

    def done(finished: int) -> None:
        nonlocal count
        count += finished
        if progress:
            progress(min(count, len(examples)), len(examples))

    scores: list[list[float]] = [[] for _ in examples]
    for index, values in zip(owner, choice_logprobs(model, items, done=done), strict=True):
        scores[index] += values
    right, logprobs = [], []
    for example, values in zip(examples, scores, strict=True):
        row = torch.tensor(values, dtype=torch.float64)
        if not bool(torch.isfinite(row).all()):
            raise HubError(
                f"the model gives NaN or infinity on {task.reference}", "try dtype: float32"
            )
        answer = example.answer or 0
        right.append(float(int(row.argmax()) == answer))
        logprobs.append(float(row.log_softmax(0)[answer]))
    return Outcome(tuple(right), tuple(logprobs))


def _result(
    tasks: Sequence[Task],
    chosen: Mapping[str, Sequence[Example]],
    outcomes: Mapping[str, Sequence[Outcome]],
    split: Split,
    seed: int,
) -> dict[str, Any]:
    rows = [
        {
            "task": task.reference,
            "digest": task.digest,
            "split": split,
            "n": len(chosen[task.reference]),
            "metric": "accuracy",
            "methods": {
                name: _scores([found[i]], [outcomes[BASE][i]], seed)
                for name, found in outcomes.items()
            },
        }
        for i, task in enumerate(tasks)
    ]
    average = {name: _scores(found, outcomes[BASE], seed) for name, found in outcomes.items()}
    templates = digest_of({task.reference: task.card.template for task in tasks})
    return {
        "schema": 1,
        "tasks": rows,
        "average": average,
        "protocol": {
            "score": "mean-token-logprob",
            "template": templates,
            "shots": 0,
            "seed": seed,
        },
        "environment": {
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "experthub": version("experthub"),
        },
    }


def _scores(found: Sequence[Outcome], base: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """Scores over one task, or the mean over several, each task counting the same."""
    accuracies = [sum(o.right) / len(o.right) for o in found]
    differences = [
        [a - b for a, b in zip(o.right, p.right, strict=True)]
        for o, p in zip(found, base, strict=True)
    ]
    one = len(found) == 1
    return {
        "accuracy": _mean(accuracies),
        "ci95": wilson(sum(found[0].right), len(found[0].right))
        if one
        else bootstrap([o.right for o in found], seed),
        "logprob": _mean([_mean(o.logprobs) for o in found]),
        "delta_to_base": {
            "value": _mean([_mean(d) for d in differences]),
            "ci95": bootstrap(differences, seed),
        },
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
