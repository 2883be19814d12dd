"""What a recipe's method cannot work with, refused by name before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence

from experthub.hub.errors import HubError, UsageError
from experthub.hub.files.patterns import matching
from experthub.hub.files.yaml_files import did_you_mean
from experthub.hub.recipes.plan import PlannedExpert
from experthub.hub.recipes.recipe import Recipe


def check_apart(ways: Sequence[Recipe], targets: Sequence[tuple[str, ...]]) -> None:
    """Refuse parts that name the same module."""
    owner: dict[str, str | None] = {}
    for way, names in zip(ways, targets, strict=True):
        for name in names:
            if name in owner:
                raise UsageError(
                    f"{name.rpartition('.')[0]} is of two parts: {owner[name]} and {way.targets}",
                    "write patterns that do not overlap",
                )
            owner[name] = way.targets


def check_method(
    recipe: Recipe, experts: tuple[PlannedExpert, ...], parameters: tuple[str, ...]
) -> None:
    """Refuse by name what the recipe's method cannot work with."""
    _check_skills(recipe, experts)
    if recipe.route is None:
        granularity = recipe.method.options.get("granularity")
        if isinstance(granularity, str):
            _check_granularity(granularity, parameters)
        return
    from experthub.routing import routers

    wanted, needs = frozenset(parameters), routers[recipe.route.method].needs
    complete: set[tuple[int, int]] = set()  # of the many experts that share their shapes
    for expert in experts:
        if not expert.low_rank:
            raise UsageError(
                f"expert {expert.label} is dense, and a route needs low-rank experts",
                "give its merge a rank, or use merge: instead of route:",
            )
        for member in expert.members:
            shape = id(member.changes), id(member.gated)
            if "gates" not in needs or shape in complete:
                continue
            modules = {n.removesuffix(".weight") for n in member.changes if n in wanted}
            if missing := sorted(modules - member.gated):
                raise HubError(
                    f"expert {member.reference} has no gate for {missing[0]}, "
                    f"which {recipe.route.method} needs",
                    f"run hub train gate {member.reference}"
                    if member.task and "/" not in member.reference
                    else "register it (hub add --task), then run hub train gate",
                )
            complete.add(shape)
    adapted = {id(m.adapted): m.adapted for e in experts for m in e.members}
    embedding = [
        a.module
        for one in adapted.values()
        for a in one
        if a.embedding and f"{a.module}.weight" in wanted
    ]
    if embedding:
        raise HubError(
            f"{embedding[0]} is an embedding, and only linear modules can be routed",
            "leave it out with targets:, or use merge: instead of route:",
        )
    if recipe.route.combine == "parameters":
        _check_equal_ranks("combine: parameters", "use combine: outputs", experts, parameters)
    if recipe.route.options.get("gks"):
        _check_general(recipe.route.options["gks"], experts, parameters)


def _check_skills(recipe: Recipe, experts: tuple[PlannedExpert, ...]) -> None:
    """Inventories of skills and the routers that are over them go together, one of each."""
    inventories = [m.reference for e in experts for m in e.members if m.kind == "skills"]
    needs = "skills" in recipe.method.strategy.needs
    if needs and (len(inventories) != 1 or len(experts) != 1):
        raise UsageError(
            f"{recipe.method.method} is over one inventory of skills, and the recipe has "
            f"{len(inventories)} among {len(experts)} experts",
            "name one that hub train skills made, and nothing else",
        )
    if inventories and not needs:
        raise UsageError(
            f"{inventories[0]} is an inventory of skills, which {recipe.method.method} cannot use",
            "say route: {method: poly}, or mhr, over it alone",
        )


def _check_granularity(granularity: str, parameters: tuple[str, ...]) -> None:
    from experthub.merge import blocks_of

    try:
        with matching():
            blocks_of(parameters, granularity)
    except (ValueError, TimeoutError) as error:
        raise UsageError(str(error), "write it simpler, or use a name") from None


def _check_general(
    named: Sequence[str], experts: tuple[PlannedExpert, ...], parameters: tuple[str, ...]
) -> None:
    """Refuse general experts that cannot be taken off the others."""
    labels = [expert.label for expert in experts]
    for name in named:
        if labels.count(name) != 1:
            raise UsageError(
                f"gks names {name}, and {labels.count(name)} experts of the recipe are called so",
                did_you_mean(name, labels) if name not in labels else "say as: for each of them",
            )
    general = [expert for expert in experts if expert.label in named]
    others = [expert for expert in experts if expert.label not in named]
    if not others:
        raise UsageError("gks names all experts, and none is left to route to", "leave one out")
    for expert in experts:
        if expert.merge is not None:
            raise UsageError(
                f"expert {expert.label} is a merge, and gks is of the stored A and B of experts",
                "name its experts one by one",
            )
    for expert in general:
        if expert.weight != 1:
            raise UsageError(
                f"expert {expert.label} has a weight, and gks takes the mean of general experts",
                "leave weight out",
            )
    for name in parameters:
        module = name.removesuffix(".weight")
        if not any(name in expert.changes for expert in others):
            raise HubError(f"only general experts adapt {module}", "leave it out with targets:")
        for expert in general:
            if name not in expert.changes:
                raise HubError(
                    f"the general expert {expert.label} does not adapt {module}, and others do",
                    "leave the module out with targets:, or take another general expert",
                )
    _check_equal_ranks("gks", "leave out what differs with targets:", experts, parameters)


def _check_equal_ranks(
    what: str, hint: str, experts: tuple[PlannedExpert, ...], parameters: tuple[str, ...]
) -> None:
    ranks: dict[str, dict[int, str]] = {}
    for expert in experts:
        for name in parameters:
            found = [
                a.rank for m in expert.members for a in m.adapted if f"{a.module}.weight" == name
            ]
            rank = min(sum(found), expert.rank or sum(found))
            if found:
                ranks.setdefault(name, {})[rank] = expert.label
    for name, by_rank in ranks.items():
        if len(by_rank) > 1:
            raise HubError(
                f"{what} needs one rank, and {name.removesuffix('.weight')} has "
                + ", ".join(f"{rank} ({label})" for rank, label in sorted(by_rank.items())),
                hint,
            )
