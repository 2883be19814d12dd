"""Resolving: from the names in a recipe to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experthub.hub.bases.base import Base
from experthub.hub.bases.base_sources import find
from experthub.hub.bases.vocabulary import find_vocabulary
from experthub.hub.conversion.opening import open_native
from experthub.hub.errors import IntegrityError, UsageError
from experthub.hub.kinds import StoredExpert, kinds
from experthub.hub.recipes.dense_checks import check_dense_parts
from experthub.hub.recipes.entries import DataUse, ExpertUse, NestedMerge, list_members
from experthub.hub.recipes.examples import PlannedData
from experthub.hub.recipes.member_cache import MemberCache
from experthub.hub.recipes.memory import estimate_memory
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.planned_experts import Member, PlannedExpert, is_large
from experthub.hub.recipes.prompt_checks import check_prompts
from experthub.hub.recipes.quantised_checks import check_quantised
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.targets import divide_parameters
from experthub.hub.recipes.vocabulary import plan_vocabulary
from experthub.hub.registry.content import Content
from experthub.hub.registry.expert import Identity, Reference, make_source_absolute
from experthub.hub.session import Session
from experthub.hub.store.folder import read_description
from experthub.hub.transfer.pull import pull
from experthub.hub.transfer.sources import open_source
from experthub.routing import parse_kernel


def resolve(
    recipe: Recipe,
    *,
    session: Session | None = None,
    pinned: Sequence[Content] | None = None,
    data: PlannedData | None = None,
    found: Content | None = None,
    packed: bool = False,
    encoders: Mapping[str, Base] = MappingProxyType({}),
) -> Plan:
    """Look up, fetch and check everything that a recipe names.

    Args:
        recipe: The recipe.
        session: The registry, the store and the progress callback. The default is `Session()`.
        pinned: The contents of the recipe's experts, in its order. By default they are looked up.
        data: The recipe's data as a lock records it. By default the tasks are read.
        found: A stored state of the method. No data is needed with it.
        packed: Accept experts that are known but not in the store, because a bank may hold them.
            If there is no such bank, the caller pulls them.
        encoders: Encoders of texts that were found already, by their names in the recipe.

    Returns:
        The plan.

    Raises:
        NotFoundError: An expert or the base is unknown.
        IntegrityError: An expert was made for another base, or its content is damaged.
        HubError: Shapes or targets do not fit, or the method lacks a state that it needs.
    """
    session = session or Session()
    _note_renamed(recipe, session)
    # Names are checked before anything is downloaded.
    contents = list(pinned or (find_content(use, session) for use in recipe.uses))
    base = find(recipe.base, session)
    if base.quantisation is not None:
        check_quantised(recipe, base, contents, session)
    reader = _ExpertReader(session, base, recipe.allow_base_mismatch)
    uses = zip(contents, recipe.uses, strict=True)
    members = iter(reader.read_members([*uses], packed and recipe.route is not None))
    experts = tuple(
        _plan_expert(entry, [next(members) for _ in list_members(entry)])
        for entry in recipe.experts
    )
    check_dense_parts(recipe, experts, base)
    check_prompts(recipe, experts, base)
    vocabulary = plan_vocabulary(base, [m for e in experts for m in e.members])
    added = None if vocabulary is None else vocabulary.added
    base = replace(base, completed=True, added=added)
    recipes = [recipe.of_part(part) for part in recipe.parts] if recipe.parts else [recipe]
    places = divide_parameters(recipes, experts, base)
    dtype = recipe.dtype or {"BF16": "bfloat16", "F16": "float16"}.get(base.dtype, "float32")
    if recipe.stored and found is None:
        found = find_content(ExpertUse(expert=recipe.stored), session)
    if found is not None:
        _check_state_kind(found, pull(session, found)[0], recipe)
    if data is None and recipe.stored is None:
        data = _plan_data(recipe, experts)
    reads = base.tensor_bytes + sum(m.size for e in experts for m in e.members)
    learned = None if found is not None else data
    memory = estimate_memory(recipes, base, experts, places, dtype, learned)
    whole, dense = (tuple(sorted({n for p in one for n in p})) for one in zip(*places, strict=True))
    plan = Plan(
        *(recipe, base, experts, whole, dtype, reads, memory, data, found, base.names.unused),
        encoders={n: encoders.get(n) or find(n, session) for n in recipe.encoder_names},
        dense=dense,
        vocabulary=vocabulary,
    )
    if recipe.parts is None:
        return plan
    pairs = zip(recipes, places, strict=True)
    parts = (replace(plan, recipe=r, parameters=own, dense=rest) for r, (own, rest) in pairs)
    return replace(plan, parts=tuple(parts))


def _note_renamed(recipe: Recipe, session: Session) -> None:
    """Report kernels for which the recipe uses an old name."""
    spelled = {method.kernel for method in recipe.methods} - {"auto"}
    if spelled:
        for name in sorted(spelled - {*map(parse_kernel, spelled)}):
            session.report(f"note: kernel: {name} is now called {parse_kernel(name)}", 0, 0)


def _check_state_kind(content: Content, identity: Identity, recipe: Recipe) -> None:
    """Check that a stored state has the kind that the recipe's method needs."""
    wanted, kind = recipe.state_key, kinds[identity.kind]
    if kind.key != wanted:
        what = kind.label if kind.footprint is None else "an expert"
        raise UsageError(
            f"{wanted}: {content.reference} is {what}", f"name a state that hub {wanted} stored"
        )


def _plan_data(recipe: Recipe, experts: Sequence[PlannedExpert]) -> PlannedData | None:
    """Return the recipe's data, or the experts' own tasks for a method that looks at those."""
    if recipe.data:
        return PlannedData.from_use(recipe.data)
    if recipe.parts or not recipe.method.strategy.needs_own_tasks:
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
    return PlannedData.from_use(DataUse(tasks=tasks, limit=method.examples_per_task))


def find_content(use: ExpertUse, session: Session) -> Content:
    """Find the content that a recipe's entry refers to now.

    Args:
        use: The entry: a registry name, a folder or a remote source.
        session: The registry for a name, and the store that a folder's content is added to.

    Returns:
        The content.

    Raises:
        NotFoundError: No registry knows the name, or there is no such folder.
    """
    reference = Reference.parse(use.expert)
    if reference.name:
        return Content.from_expert(session.registry.find_expert(reference))
    with (
        open_source(use.expert, Path.cwd(), session.report) as opened,
        open_native(opened, session) as native,
    ):
        found = native.opened
        digest, _ = session.store.add(found.folder, found.stated, hashed=found.hashed)
        task = read_description(found.folder).get("task")
    source = make_source_absolute(use.expert, Path.cwd())
    return Content(use.expert, digest, (source,), task if isinstance(task, str) else None)


@dataclass(frozen=True)
class _ExpertReader:
    """A reader of stored experts, which checks them against a base; equal shapes only once."""

    session: Session
    base: Base
    allow_mismatch: bool
    memo: dict[int, tuple[object, Any]] = field(default_factory=dict)

    def read_members(
        self, named: Sequence[tuple[Content, ExpertUse]], packed: bool
    ) -> list[Member]:
        """Read all experts of a recipe from the store, or from the cache if a bank may hold them."""
        contents = [content for content, _ in named]
        cache = MemberCache.for_composition(contents, self.base, self.allow_mismatch)
        weighed = [(content, use.weight) for content, use in named]
        if packed and (known := cache.load_members(weighed)):
            return known
        identities = pull(self.session, *contents)
        pairs = zip(named, identities, strict=True)
        found = [self.check_member(use, content, identity) for (content, use), identity in pairs]
        if packed and is_large(found):
            cache.write(found)
        return found

    def check_member(self, use: ExpertUse, found: Content, identity: Identity) -> Member:
        """Check one expert as the recipe names it."""
        reference, other = found.reference, identity.base_fingerprint
        if other and other != self.base.fingerprint and not self.allow_mismatch:
            raise IntegrityError(
                f"expert {reference} was made for the base {other[:19]}, "
                f"and {self.base.name} is {self.base.fingerprint[:19]}",
                "use its own base, or set allow_base_mismatch: true if you know that it fits",
            )
        kind = kinds[identity.kind]
        if kind.footprint is None:
            raise UsageError(
                f"{reference} holds {kind.label}, which is not an expert",
                f"set {kind.key}: {reference}, beside the experts that it belongs to",
            )
        digests = {name: info.sha256 for name, info in identity.files.items()}
        stored = StoredExpert(
            reference,
            digests,
            self.base,
            locate=lambda name: self.session.store.path(digests[name]),
            verify=lambda name: self.session.store.verify_object(digests[name]),
            memo=self.memo,
            list_vocabulary=lambda: find_vocabulary(self.base),
        )
        size = sum(info.size for info in identity.files.values())
        footprint = kind.footprint(stored)
        if footprint.copies:
            self.session.report(
                f"note: {reference}: not used, because they repeat weights of the base: "
                f"{', '.join(footprint.copies[:3])}{' ...' * (len(footprint.copies) > 3)}",
                0,
                0,
            )
        return Member(found, kind.name, use.weight, size, footprint)


def _plan_expert(entry: ExpertUse | NestedMerge, members: list[Member]) -> PlannedExpert:
    """Plan one entry of the recipe."""
    if isinstance(entry, ExpertUse):
        place = _remove_version(members[0].reference).rstrip("/")
        label = entry.as_ or place.rpartition("/")[2]
        return PlannedExpert(label, entry.weight, tuple(members))
    label = entry.as_ or "+".join(_remove_version(m.reference) for m in members)
    return PlannedExpert(label, entry.weight, tuple(members), entry.merge, entry.rank)


def _remove_version(reference: str) -> str:
    """Remove the version or the revision from a reference; an @ in a path belongs to the path."""
    return reference if reference.startswith("/") else reference.partition("@")[0]
