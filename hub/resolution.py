"""Resolving: from the names in a recipe to a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experthub.hub._patterns import matching
from experthub.hub._yaml import did_you_mean
from experthub.hub.base_sources import find
from experthub.hub.bases import Base, Report, silent
from experthub.hub.compatibility import check_apart, check_method
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.expert import (
    ADAPTER,
    ADAPTER_CONFIG,
    DESCRIPTION,
    GATES,
    SKILLS,
    SKILLS_JSON,
    Identity,
    Reference,
    absolute_source,
)
from experthub.hub.formats.adapter import check_shapes, read_adapter, read_gates, read_json
from experthub.hub.formats.skills import read_skills
from experthub.hub.formats.task_vector import read_task_vector
from experthub.hub.learning.examples import PlannedData
from experthub.hub.plan import Member, Plan, PlannedExpert
from experthub.hub.pull import Content, pull
from experthub.hub.recipe import DataUse, ExpertUse, NestedMerge, Recipe, members_of
from experthub.hub.registry import Registry
from experthub.hub.sources import opened
from experthub.hub.store import Store

FOUND = {"coefficients": "learned coefficients", "router": "a router's state"}
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "F32": 4, "BF16": 2, "F16": 2}


def resolve(
    recipe: Recipe,
    registry: Registry | None = None,
    store: Store | None = None,
    report: Report = silent,
    pinned: Sequence[Content] | None = None,
    data: PlannedData | None = None,
    found: Content | None = None,
) -> Plan:
    """Look up, fetch and check everything that a recipe names.

    pinned: the contents of the recipe's experts in its order, which are looked up by default.
    data: what a lock says of the recipe's data, in the place of the tasks themselves.
    found: by the method before, so that no data is needed.
    Raises NotFoundError for unknown experts or bases, IntegrityError for another base or damaged
    content, HubError for shapes and targets that do not fit or state that the method lacks.
    """
    registry, store = registry or Registry.read(), store or Store()
    # Cheap refusals first: names before downloads.
    contents = iter(pinned or (find_content(use, registry, store, report) for use in recipe.uses))
    stored = [[next(contents) for _ in members_of(entry)] for entry in recipe.experts]
    for content in (content for group in stored for content in group):
        pull(content, store, report)
    base = find(recipe.base, registry, report)
    experts = tuple(
        _plan_expert(
            entry,
            [
                _member(use, found, base, recipe, store)
                for use, found in zip(members_of(entry), group, strict=True)
            ],
        )
        for entry, group in zip(recipe.experts, stored, strict=True)
    )
    ways = [recipe.of_part(part) for part in recipe.parts] if recipe.parts else [recipe]
    targets = [_targets(way, experts, base) for way in ways]
    check_apart(ways, targets)
    for way, parameters in zip(ways, targets, strict=True):
        check_method(way, experts, parameters)
    dtype = recipe.dtype or {"BF16": "bfloat16", "F16": "float16"}.get(base.dtype, "float32")
    if recipe.stored and found is None:
        found = find_content(ExpertUse(expert=recipe.stored), registry, store, report)
    if found is not None:
        pull(found, store, report)
        _check_found(found, recipe, store)
    if data is None and recipe.stored is None:
        data = _data(recipe, experts)
    reads = base.tensor_bytes + sum(m.size for e in experts for m in e.members)
    memory = base.tensor_bytes * WIDTH[dtype] // WIDTH.get(base.dtype, 4)
    if any(way.route for way in ways):
        memory += sum(m.size for e in experts for m in e.members)
    whole = tuple(sorted(name for own in targets for name in own))
    plan = Plan(recipe, base, experts, whole, dtype, reads, memory, data, found)
    if recipe.parts is None:
        return plan
    pairs = zip(ways, targets, strict=True)
    return replace(plan, parts=tuple(replace(plan, recipe=w, parameters=own) for w, own in pairs))


def _check_found(content: Content, recipe: Recipe, store: Store) -> None:
    wanted = "coefficients" if recipe.route is None else "router"
    kind = store.identity(content.digest).kind
    if kind != wanted:
        what = FOUND.get(kind, "an expert")
        raise UsageError(
            f"{wanted}: {content.reference} is {what}", f"name what hub {wanted} stored"
        )


def _data(recipe: Recipe, experts: Sequence[PlannedExpert]) -> PlannedData | None:
    """What the recipe says, or the experts' own tasks for a method that looks at those."""
    if recipe.data:
        return PlannedData.of(recipe.data)
    if recipe.parts or not recipe.method.strategy.own_tasks:
        return None
    method = recipe.method
    members = [member for expert in experts for member in expert.members]
    for member in members:
        if member.task is None:
            raise UsageError(
                f"{member.reference} does not say which task it was trained on, "
                f"and {method.method} looks at examples of it",
                "add it again with --task, or name a router: that was made before",
            )
    tasks = list(dict.fromkeys(m.task for m in members if m.task))
    return PlannedData.of(DataUse(tasks=tasks, limit=method.options["examples"]))


def find_content(use: ExpertUse, registry: Registry, store: Store, report: Report) -> Content:
    """The content that a use means now; a folder's is in the store when this returns."""
    reference = Reference.parse(use.expert)
    if reference.name:
        return Content.of(registry.expert(reference))
    with opened(use.expert, Path.cwd(), report) as (folder, hashed):
        digest, _ = store.add(folder, hashed=hashed)
        stated = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else {}
    source, task = absolute_source(use.expert, Path.cwd()), stated.get("task")
    return Content(use.expert, digest, (source,), task if isinstance(task, str) else None)


def _member(use: ExpertUse, found: Content, base: Base, recipe: Recipe, store: Store) -> Member:
    reference, digest = found.reference, found.digest
    identity = store.identity(digest)
    other = identity.base_fingerprint
    if other and other != base.fingerprint and not recipe.allow_base_mismatch:
        raise IntegrityError(
            f"expert {reference} was made for the base {other[:19]}, "
            f"and {base.name} is {base.fingerprint[:19]}",
            "use its own base, or say allow_base_mismatch: true if you know that it fits",
        )
    size = sum(info.size for info in identity.files.values())
    if identity.kind in FOUND:
        raise UsageError(
            f"{reference} holds {FOUND[identity.kind]}, and is no expert",
            f"say {identity.kind}: {reference}, beside the experts that it is of",
        )
    if identity.kind == "task_vector":
        changes = _dense_changes(store, identity, digest, reference, base)
        return Member(found, "task_vector", use.weight, size, changes, (), frozenset())
    if identity.kind == "skills":
        record, adapted = read_skills(store.file(digest, SKILLS_JSON), store.locate(digest, SKILLS))
        check_shapes(adapted, base.shapes, reference, base.name)
        changes = {f"{a.module}.weight": a.shape for a in adapted}
        tasks = tuple(record.tasks)
        return Member(found, "skills", use.weight, size, changes, adapted, frozenset(), tasks)
    config, weights = store.file(digest, ADAPTER_CONFIG), store.locate(digest, ADAPTER)
    adapted = read_adapter(config, weights, reference)
    check_shapes(adapted, base.shapes, reference, base.name)
    gated: frozenset[str] = frozenset()
    if GATES in identity.files:
        gated = frozenset(read_gates(store.locate(digest, GATES)))
    changes = {f"{a.module}.weight": a.shape for a in adapted}
    return Member(found, "lora", use.weight, size, changes, adapted, gated)


def _dense_changes(
    store: Store, identity: Identity, digest: str, reference: str, base: Base
) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape of what a task vector changes; of tied weights, every use that it has not."""
    stored = read_task_vector({n: store.locate(digest, n) for n in identity.weights})
    changes = {name: change.shape for name, change in stored.items()}
    changes |= {
        use: changes[n] for use, n in base.tied.items() if n in changes and use not in changes
    }
    for name, shape in changes.items():
        if base.shapes.get(name) != shape:
            raise HubError(
                f"{reference}: changes {name} {list(shape)}, where {base.name} has "
                f"{list(base.shapes.get(name, ())) or 'nothing'}",
                did_you_mean(name, base.shapes),
            )
    return changes


def _plan_expert(entry: ExpertUse | NestedMerge, members: list[Member]) -> PlannedExpert:
    if isinstance(entry, ExpertUse):
        label = entry.as_ or members[0].reference.split("@")[0].rstrip("/").rsplit("/", 1)[-1]
        return PlannedExpert(label, entry.weight, tuple(members))
    label = entry.as_ or "+".join(m.reference.split("@")[0] for m in members)
    return PlannedExpert(label, entry.weight, tuple(members), entry.merge, entry.rank)


def _targets(recipe: Recipe, experts: tuple[PlannedExpert, ...], base: Base) -> tuple[str, ...]:
    names = sorted({name for expert in experts for name in expert.changes})
    if recipe.targets is None:
        return tuple(names)
    try:
        with matching():
            chosen = [n for n in names if re.fullmatch(recipe.targets, n.rpartition(".")[0])]
    except TimeoutError as error:
        raise UsageError(f"targets {recipe.targets!r}: {error}", "write it simpler") from None
    if not chosen:
        raise HubError(
            f"targets {recipe.targets!r} matches no module that the experts change",
            f"they change {names[0].rpartition('.')[0]} and {len(names) - 1} more",
        )
    return tuple(chosen)
