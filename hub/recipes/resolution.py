"""Resolving: from the names in a recipe to a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.errors import HubError, IntegrityError, UsageError
from experthub.hub.files.json_files import read_json
from experthub.hub.files.patterns import matching
from experthub.hub.files.yaml_files import did_you_mean
from experthub.hub.formats.adapter import Adapted, check_shapes, read_adapter, read_gates
from experthub.hub.formats.skills import read_skills
from experthub.hub.formats.task_vector import read_task_vector
from experthub.hub.progress import Report, silent
from experthub.hub.recipes.compatibility import check_apart, check_method
from experthub.hub.recipes.examples import PlannedData
from experthub.hub.recipes.member_cache import Catalogue
from experthub.hub.recipes.plan import Member, Plan, PlannedExpert, is_large
from experthub.hub.recipes.recipe import DataUse, ExpertUse, NestedMerge, Recipe, members_of
from experthub.hub.registry.expert import (
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
from experthub.hub.registry.registry import Registry
from experthub.hub.store.store import Store
from experthub.hub.transfer.pull import Content, pull
from experthub.hub.transfer.sources import opened

Changes = dict[str, tuple[int, ...]]
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
    packed: bool = False,
) -> Plan:
    """Look up, fetch and check everything that a recipe names.

    pinned: the contents of the recipe's experts in its order, which are looked up by default.
    data: what a lock says of the recipe's data, in the place of the tasks themselves.
    found: by the method before, so that no data is needed.  packed: the experts need not be in the
    store if they are known from before, because a bank may hold them; without that bank, pull them.
    Raises NotFoundError for unknown experts or bases, IntegrityError for another base or damaged
    content, HubError for shapes and targets that do not fit or state that the method lacks.
    """
    registry, store = registry or Registry.read(), store or Store()
    # Cheap refusals first: names before downloads.
    contents = list(pinned or (find_content(use, registry, store, report) for use in recipe.uses))
    base = find(recipe.base, registry, report)
    stock = _Stock(store, base, recipe.allow_base_mismatch, report)
    uses = zip(contents, recipe.uses, strict=True)
    members = iter(stock.members([*uses], packed and recipe.route is not None))
    experts = tuple(
        _plan_expert(entry, [next(members) for _ in members_of(entry)]) for entry in recipe.experts
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
        _check_found(found, pull(store, found, report=report)[0], recipe)
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


def _check_found(content: Content, identity: Identity, recipe: Recipe) -> None:
    wanted = "coefficients" if recipe.route is None else "router"
    if identity.kind != wanted:
        what = FOUND.get(identity.kind, "an expert")
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


@dataclass(frozen=True)
class _Stock:
    """Stored experts against a base.  Many have the same shapes, which are checked once."""

    store: Store
    base: Base
    allow_mismatch: bool
    report: Report
    fitting: dict[int, tuple[tuple[Adapted, ...], Changes]] = field(default_factory=dict)
    gates: dict[int, tuple[Changes, frozenset[str]]] = field(default_factory=dict)

    def members(self, named: Sequence[tuple[Content, ExpertUse]], packed: bool) -> list[Member]:
        """All experts of a recipe, from the store, or as they are known if they may be packed."""
        contents = [content for content, _ in named]
        catalogue = Catalogue.of(contents, self.base, self.allow_mismatch)
        weighed = [(content, use.weight) for content, use in named]
        if packed and (known := catalogue.members(weighed)):
            return known
        identities = pull(self.store, *contents, report=self.report)
        pairs = zip(named, identities, strict=True)
        found = [self.member(use, content, identity) for (content, use), identity in pairs]
        if packed and is_large(found) and all(member.kind == "lora" for member in found):
            catalogue.keep(found)
        return found

    def member(self, use: ExpertUse, found: Content, identity: Identity) -> Member:
        """One expert as the recipe names it, checked."""
        reference, other = found.reference, identity.base_fingerprint
        if other and other != self.base.fingerprint and not self.allow_mismatch:
            raise IntegrityError(
                f"expert {reference} was made for the base {other[:19]}, "
                f"and {self.base.name} is {self.base.fingerprint[:19]}",
                "use its own base, or say allow_base_mismatch: true if you know that it fits",
            )
        if identity.kind in FOUND:
            raise UsageError(
                f"{reference} holds {FOUND[identity.kind]}, and is no expert",
                f"say {identity.kind}: {reference}, beside the experts that it is of",
            )
        size = sum(info.size for info in identity.files.values())
        adapted: tuple[Adapted, ...] = ()
        gated: frozenset[str] = frozenset()
        tasks: tuple[str, ...] = ()
        if identity.kind == "task_vector":
            changes = self._dense(
                {n: self._place(identity, n) for n in identity.weights}, reference
            )
        elif identity.kind == "skills":
            written = self._checked(identity, SKILLS_JSON)
            record, adapted = read_skills(written, self._place(identity, SKILLS))
            changes, tasks = self._fit(adapted, reference), tuple(record.tasks)
        else:
            config = self._checked(identity, ADAPTER_CONFIG)
            adapted = read_adapter(config, self._place(identity, ADAPTER), reference)
            changes = self._fit(adapted, reference)
            if GATES in identity.files:
                gated = self._gated(self._place(identity, GATES))
        return Member(found, identity.kind, use.weight, size, changes, adapted, gated, tasks)

    def _place(self, identity: Identity, name: str) -> Path:
        return self.store.path(identity.files[name].sha256)

    def _checked(self, identity: Identity, name: str) -> Path:
        return self.store.checked(identity.files[name].sha256)

    def _fit(self, adapted: tuple[Adapted, ...], reference: str) -> Changes:
        """Parameter -> shape of what a LoRA changes."""
        if id(adapted) not in self.fitting:
            check_shapes(adapted, self.base.shapes, reference, self.base.name)
            changes: Changes = {f"{a.module}.weight": a.shape for a in adapted}
            self.fitting[id(adapted)] = adapted, changes
        return self.fitting[id(adapted)][1]

    def _gated(self, path: Path) -> frozenset[str]:
        gates = read_gates(path)
        return self.gates.setdefault(id(gates), (gates, frozenset(gates)))[1]

    def _dense(self, files: dict[str, Path], reference: str) -> Changes:
        """Parameter -> shape of what a task vector changes; of tied weights, every use that it has not."""
        base, stored = self.base, read_task_vector(files)
        changes: Changes = {name: change.shape for name, change in stored.items()}
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
    shapes = {id(m.changes): m.changes for expert in experts for m in expert.members}
    names = sorted({name for changes in shapes.values() for name in changes})
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
