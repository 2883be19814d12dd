"""Making the state of a router: from examples of the experts' own tasks, or from the recipe's data.

Shapes: N examples, D features of an embedding, E experts, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from experthub.hub.bases.base import load_model
from experthub.hub.composition.composition import Composition, compose
from experthub.hub.errors import HubError, UsageError
from experthub.hub.materials.embedder import Embedder
from experthub.hub.materials.router_state import State
from experthub.hub.materials.task_data import TaskData
from experthub.hub.progress import Report
from experthub.hub.readers.features import watched
from experthub.hub.readers.reader import Reader, read_all
from experthub.hub.readers.reader_for import reader_for
from experthub.hub.recipes.examples import chosen
from experthub.hub.recipes.method import Method
from experthub.hub.recipes.plan import Plan, PlannedExpert
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.hub.tasks.task import Chosen
from experthub.routing import RoutedLinear, untrained_classifier
from torch import Tensor, nn


def make(
    plan: Plan, device: str | None, registry: Registry | None, store: Store, report: Report
) -> State:
    """The state that a plan's router needs."""
    if plan.data is None:
        raise UsageError(f"{plan.recipe.method.method} needs data", "say data: in the recipe")
    given = chosen(plan.data.use)
    needs = plan.recipe.method.strategy.needs
    if "index" in needs:
        return _index(plan, given, registry, report)
    if "hidden" in needs:
        return _classifier(plan, given, device, store, report)
    model = load_model(plan.base, "float32", device)
    reader = reader_for(plan.base, device, lambda: model)
    found: list[Any] = []
    for number, expert in enumerate(plan.experts):
        report(f"reading examples with {expert.label}", number, len(plan.experts))
        alone = compose(_alone(plan, expert), model=model, store=store)
        if "activations" in needs:
            found.append(_activations(alone, reader, _own(expert, given)))
        else:
            found.append(_accuracy(alone, reader, given))
    report("reading examples", len(plan.experts), len(plan.experts))
    if "activations" in needs:
        named = {f"{e}.{name}": v for e, own in enumerate(found) for name, v in own.items()}
        return State(named)
    return State({"scores": torch.tensor(found)})


def _own(expert: PlannedExpert, given: Sequence[Chosen]) -> list[Chosen]:
    """The examples of the tasks that an expert was trained on."""
    tasks = {member.task for member in expert.members}
    return [one for one in given if one.task.reference in tasks]


def _alone(plan: Plan, expert: PlannedExpert) -> Plan:
    """The plan of one of its experts, with no other and no router that chooses."""
    uniform = Method(kind="route", method="uniform")
    recipe = plan.recipe.model_copy(update={"route": uniform, "data": None, "router": None})
    parameters = tuple(name for name in plan.parameters if name in expert.changes)
    return replace(
        plan,
        recipe=recipe,
        experts=(replace(expert, weight=1.0),),
        parameters=parameters,
        dtype="float32",
        data=None,
        found=None,
    )


def _texts(plan: Plan, one: Chosen) -> list[str]:
    """What the model will read of a task's examples."""
    if plan.base.causal:
        return [one.task.prompt(example) for example in one.examples]
    return [example.input for example in one.examples]


def _index(plan: Plan, given: Sequence[Chosen], registry: Registry | None, report: Report) -> State:
    """Unit embeddings of examples of every expert's tasks, and whose they are."""
    embedder = Embedder.of(plan.recipe.method.options["embedder"], registry, report)
    rows, owners = [], []
    for number, expert in enumerate(plan.experts):
        report(f"embedding examples for {expert.label}", number, len(plan.experts))
        texts = [text for one in _own(expert, given) for text in _texts(plan, one)]
        rows.append(embedder(texts))
        owners += [number] * len(texts)
    report("embedding examples", len(plan.experts), len(plan.experts))
    tensors = {"index": torch.cat(rows), "owner": torch.tensor(owners)}
    return State(tensors, embedder.fingerprint)


@torch.no_grad()
def _activations(alone: Composition, reader: Reader, own: Sequence[Chosen]) -> dict[str, Tensor]:
    """The mean input `[I]` of every routed module over the real tokens of some examples."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def seen(name: str, x_TI: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + x_TI.sum(0)
        counts[name] = counts.get(name, torch.zeros(())) + len(x_TI)

    routed = {n: m for n, m in alone.model.named_modules() if isinstance(m, RoutedLinear)}
    with watched(routed, reader, seen):
        for one in own:
            rows = [reader.row(reader.question(one.task, e)) for e in one.examples]
            read_all(reader, alone.model, rows, max(len(one.task.choices(e)) for e in one.examples))
    return {name: sums[name] / counts[name].clamp(min=1) for name in sums}


@torch.no_grad()
def _accuracy(alone: Composition, reader: Reader, given: Sequence[Chosen]) -> float:
    """The mean over tasks of the share of examples that one expert gets right."""
    shares = []
    for one in given:
        rows = [reader.row(reader.question(one.task, e)) for e in one.examples]
        width = max(len(one.task.choices(e)) for e in one.examples)
        logits_NC = read_all(reader, alone.model, rows, width)
        shares.append(
            float((logits_NC.argmax(-1).cpu() == torch.tensor(one.labels)).float().mean())
        )
    return sum(shares) / len(shares)


def _classifier(
    plan: Plan, given: Sequence[Chosen], device: str | None, store: Store, report: Report
) -> State:
    """X-LoRA's classifier, trained on the recipe's data by AdamW; base and experts are frozen."""
    options = plan.recipe.method.options
    model = load_model(plan.base, "float32", device)
    layers = len(plan.layers)
    state = untrained_classifier(
        model.config.get_text_config().hidden_size,
        layers,
        len(plan.experts),
        options,
        options["seed"],
    )
    tensors = {n: t.to(model.device).requires_grad_() for n, t in state.items()}
    alone = replace(plan, dtype="float32")
    composed = compose(alone, model=model, store=store, router=State(tensors))
    reader = reader_for(plan.base, device, lambda: model)
    data = TaskData(composed.model, reader, given, labelled=True)
    labels = data.labels or []
    optimizer = torch.optim.AdamW(tensors.values(), lr=options["lr"])
    places = [(task, row) for task, size in enumerate(data.sizes) for row in range(size)]
    random = torch.Generator().manual_seed(options["seed"])
    history = []
    for step in range(options["steps"]):
        picked = torch.randint(len(places), (options["batch_size"],), generator=random).tolist()
        rows = [[places[i][1] for i in picked if places[i][0] == t] for t in range(len(labels))]
        with torch.enable_grad():
            logits = data.logits([torch.tensor(own, dtype=torch.long) for own in rows])
            losses = [
                nn.functional.cross_entropy(found, labels[t][own], reduction="sum")
                for t, (found, own) in enumerate(zip(logits, rows, strict=True))
                if own
            ]
            loss = torch.stack(losses).sum() / len(picked)
        if not bool(torch.isfinite(loss)):
            raise HubError(f"training the router diverged at step {step}", "lower lr")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(loss.item())
        report("training the router", step + 1, options["steps"])
    return State({n: t.detach().cpu() for n, t in tensors.items()}, history=history)
