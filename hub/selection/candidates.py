"""Which experts are compared: those that are named, or all that the registries have for a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from experthub.hub.errors import NotFoundError, UsageError
from experthub.hub.kinds import kinds
from experthub.hub.recipes.plan import Plan, PlannedExpert
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session


def candidates(base: str | None, experts: Sequence[str], session: Session) -> Plan:
    """Plan the experts to compare: fetch them and check them against their base.

    Args:
        base: The base's reference. None means the base of the experts.
        experts: References. If there are none, the newest version of every expert of the base.
        session: The registry, the store and the progress callback.

    Returns:
        A plan with the experts, in float32.

    Raises:
        NotFoundError: There is no such expert.
        UsageError: The experts do not determine one base.
    """
    registry = session.registry
    base = base or _base_of(experts, registry)
    chosen = list(dict.fromkeys(_versioned(text, registry) for text in experts)) or [
        e.reference for e in _all_of(base, registry)
    ]
    if not chosen:
        if not registry.has_base(base) and not _is_place(base):
            registry.base(base)  # which says what there is
        raise NotFoundError(f"no registry knows an expert of {base}", "see hub list")
    recipe = {"base": base, "experts": chosen, "merge": {"method": "linear"}, "dtype": "float32"}
    return resolve(Recipe.of(recipe), session=session)


def alone(plan: Plan, expert: PlannedExpert) -> Plan:
    """The plan of the base with one of a plan's experts, whole."""
    own = tuple(name for name in plan.parameters if name in expert.changes)
    return replace(plan, experts=(expert,), parameters=own)


def _all_of(base: str, registry: Registry) -> list[Expert]:
    wanted = _base_name(base, registry)
    names = dict.fromkeys(e.name for e in registry.experts())
    newest = [registry.expert(Reference.parse(name)) for name in names]
    return [e for e in newest if _base_name(e.base, registry) == wanted and kinds[e.kind].load]


def _base_name(base: str, registry: Registry) -> str:
    """The registry's name of a base that is also known as others; any other as it is."""
    return registry.base(base)[0] if registry.has_base(base) else base


def _versioned(text: str, registry: Registry) -> str:
    """A bare name with its version; a digest, which may be more exact than that, and a place as they are."""
    reference = Reference.parse(text)
    bare = reference.name and reference.version is None and not reference.digest
    return registry.expert(reference).reference if bare else text


def _is_place(base: str) -> bool:
    """Whether a base is a folder or a remote place, and no name."""
    try:
        reference = Reference.parse(base)
    except UsageError:
        return False
    return reference.folder is not None or bool(reference.remote)


def _base_of(experts: Sequence[str], registry: Registry) -> str:
    if experts:
        references = [Reference.parse(text) for text in experts]
        known = [registry.expert(reference) for reference in references if reference.name]
    else:
        known = [expert for expert in registry.experts() if kinds[expert.kind].load]
    bases = sorted({_base_name(expert.base, registry) for expert in known})
    if len(bases) == 1:
        return bases[0]
    found = f"{len(bases)} bases: {', '.join(bases)}" if bases else "no known base"
    raise UsageError(f"the experts have {found}", "say --base")
