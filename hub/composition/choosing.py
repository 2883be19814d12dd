"""How experts are chosen for whole rows: by their text, their tasks, or what the base sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experthub.hub.bases.base import load_tokenizer
from experthub.hub.composition.forward_hooks import Batch, Watch
from experthub.hub.errors import UsageError, explained
from experthub.hub.materials.router_state import State
from experthub.hub.progress import Report
from experthub.hub.recipes.plan import Plan
from experthub.hub.registry.registry import Registry
from experthub.routing import Select


def attach(
    watch: Watch,
    model: Any,
    plan: Plan,
    state: State,
    select: Select | None,
    registry: Registry | None,
    report: Report,
) -> None:
    """Hook the model for a router that needs to know more than the inputs of modules."""
    method = plan.recipe.method
    if model.config.is_encoder_decoder or not (plan.base.causal or plan.base.encoder):
        raise UsageError(
            f"{method.method} chooses for whole examples, and {plan.base.name} is a "
            f"{type(model).__name__}",
            "use a language model or an encoder, or a router by token",
        )
    needs = method.strategy.needs
    if select is not None and "hidden" in needs:
        watch.weigh = select
    elif select is not None and "index" in needs:
        watch.choose = _by_text(plan, state, select, registry, report)
    elif select is not None:
        watch.choose = by_task(select)
    watch.attach(model)


def _by_text(
    plan: Plan, state: State, select: Select, registry: Registry | None, report: Report
) -> Any:
    from experthub.hub.materials.embedder import Embedder

    embedder = Embedder.of(plan.recipe.method.options["embedder"], registry, report)
    embedder.check(state)
    tokenizer = load_tokenizer(plan.base)

    def choose(batch: Batch, tasks: Sequence[str] | None) -> Any:
        pairs = zip(batch.ids.tolist(), batch.real.tolist(), strict=True)
        ids = [[i for i, real in zip(row, kept, strict=True) if real] for row, kept in pairs]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return select(embedder(texts).to(batch.ids.device))

    return choose


def by_task(select: Select) -> Any:
    """How a watch chooses by the tasks that were said of the rows."""

    def choose(batch: Batch, tasks: Sequence[str] | None) -> Any:
        rows = len(batch.ids)
        if tasks is not None and len(tasks) not in (1, rows):
            raise UsageError(
                f"{len(tasks)} tasks were said for a batch of {rows} rows", "say one for each row"
            )
        names = [""] * rows if tasks is None else list(tasks) * (rows if len(tasks) == 1 else 1)
        with explained("task"):
            return select(names)

    return choose
