"""Candidates of a comparison: the named experts, or all experts of a base in the registries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from experthub.hub.errors import NotFoundError, UsageError
from experthub.hub.kinds import kinds
from experthub.hub.recipes.plan import Plan
from experthub.hub.recipes.planned_experts import PlannedExpert
from experthub.hub.recipes.recipe import Recipe
from experthub.hub.recipes.resolution import resolve
from experthub.hub.registry.expert import Expert, Reference
from experthub.hub.registry.registry import Registry
from experthub.hub.session import Session


def plan_candidates(base: str | None, experts: Sequence[str], session: Session) -> Plan:
    """Plan the experts to compare: fetch them, and check them against their base.

    Args:
        base: The base's reference. None means the base of the experts.
        experts: References. If there are none, the newest version of every expert of the base is
            used.
        session: The registry, the store and the progress callback.

    Returns:
        A plan with the experts, in float32.

    Raises:
        NotFoundError: An expert or the base does not exist, or the base has no experts.
        UsageError: The experts do not determine one base.
    """
    registry = session.registry
    base = base or _find_base(experts, registry)
    chosen = list(dict.fromkeys(_add_version(text, registry) for text in experts)) or [
        e.reference for e in _list_experts(base, registry)
    ]
    if not chosen:
        if not registry.has_base(base) and not _is_place(base):
            registry.find_base(base)  # It raises an error that suggests a known base.
        raise NotFoundError(
            f"no registry has an expert of {base}", "run hub list to see all experts"
        )
    recipe = {"base": base, "experts": chosen, "merge": {"method": "linear"}, "dtype": "float32"}
    return resolve(Recipe.of(recipe), session=session)


def isolate_expert(plan: Plan, expert: PlannedExpert) -> Plan:
    """Reduce a plan to one of its experts, with all parameters that this expert changes.

    Args:
        plan: A plan.
        expert: One of its experts.

    Returns:
        The plan of the base with this expert.
    """
    own = tuple(name for name in plan.parameters if name in expert.changes)
    return replace(plan, experts=(expert,), parameters=own)


def _list_experts(base: str, registry: Registry) -> list[Expert]:
    """List the newest version of every expert of a base that can be merged or routed."""
    wanted = _canonicalise_base(base, registry)
    names = dict.fromkeys(e.name for e in registry.list_experts())
    newest = [registry.find_expert(Reference.parse(name)) for name in names]
    return [e for e in newest if _canonicalise_base(e.base, registry) == wanted and _is_change(e)]


def _is_change(expert: Expert) -> bool:
    """Tell whether an expert is of a known kind that changes weights."""
    return expert.kind in kinds and kinds[expert.kind].load is not None


def _canonicalise_base(base: str, registry: Registry) -> str:
    """Replace an alias of a base by its registered name; return any other text unchanged."""
    return registry.find_base(base)[0] if registry.has_base(base) else base


def _add_version(text: str, registry: Registry) -> str:
    """Add the newest version to a bare name; return versioned names, digests and places unchanged."""
    reference = Reference.parse(text)
    bare = reference.name and reference.version is None and not reference.digest
    return registry.find_expert(reference).reference if bare else text


def _is_place(base: str) -> bool:
    """Check whether a base is a folder or a remote place, and not a name."""
    try:
        reference = Reference.parse(base)
    except UsageError:
        return False
    return reference.folder is not None or bool(reference.remote)


def _find_base(experts: Sequence[str], registry: Registry) -> str:
    """Find the one base of the named experts, or of all experts if none is named."""
    if experts:
        references = [Reference.parse(text) for text in experts]
        known = [registry.find_expert(reference) for reference in references if reference.name]
    else:
        known = [expert for expert in registry.list_experts() if _is_change(expert)]
    bases = sorted({_canonicalise_base(expert.base, registry) for expert in known})
    if len(bases) == 1:
        return bases[0]
    found = f"{len(bases)} bases: {', '.join(bases)}" if bases else "no known base"
    raise UsageError(f"the experts have {found}", "pass a base with --base")
